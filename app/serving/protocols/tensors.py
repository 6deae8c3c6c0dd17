"""Requests and answers of the Open Inference Protocol v2 over HTTP, with its binary tensor data extension.

Every input column is an input tensor of the same name and of shape [rows] or [rows, 1]. A number has the data
type FP64, FP32, BOOL or an integer type; a category or text has BYTES. Missing values are encoded as in all
other inputs (`app.data.cells`); NaN and the empty string are missing. The input of a nullable column may be
left out, and optional members of the request may be null. `parameters.unit` is the unit.

The only output is `probability`, FP32, of shape [rows, 1] or [rows, classes]; the metadata name the classes.
A recommender has the outputs `items` (BYTES) and `scores` (FP32), both of shape [rows, k], and `known` (BOOL)
of shape [rows]. `parameters.k` sets k, 10 by default. If fewer than k items remain to recommend, the row ends
with empty strings.

https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError

from app.bundle.bundle import ITEMS, KNOWN, OUTPUT, SCORES
from app.bundle.schema import Schema
from app.serving.http import JSON, Refused
from app.serving.protocols.binary import pack
from app.serving.protocols.contract import (
    DEFAULT_NUM_ITEMS,
    Answer,
    Contract,
    Location,
    Query,
    dotted,
    validation_refusal,
)
from app.serving.protocols.tensor_request import (
    InferenceRequest,
    RequestParameters,
    output_names,
    read_columns,
)

OUTPUT_TYPES = {"f": "FP32", "b": "BOOL", "O": "BYTES"}
"""Data type of an output by the kind of its numpy type."""
BINARY = "application/octet-stream"
"""Media type of a body with binary data."""
HEADER_LENGTH = "inference-header-content-length"
"""HTTP header with the length in bytes of the JSON at the start of a body; the binary data follow."""


@dataclass(frozen=True)
class Inference:
    """A request that satisfies the contract, and the outputs that it requests."""

    query: Query
    id: str | None
    """Id that the client has set for the answer."""
    outputs: dict[str, bool]
    """Requested outputs by name; True if the output is sent as binary data."""


def parse(body: bytes, header_length: str | None, contract: Contract) -> Inference:
    """Parse a request; `header_length` is the value of the header HEADER_LENGTH, None if it is missing.

    Raises Refused with all violations.
    """
    json_length = len(body) if header_length is None else _json_length(header_length, len(body))
    try:
        request = InferenceRequest.model_validate_json(body[:json_length])
    except ValidationError as error:
        raise validation_refusal(error) from None
    columns, num_rows = read_columns(request, memoryview(body)[json_length:], contract)
    parameters = request.parameters or RequestParameters()
    query = contract.check(columns, num_rows, parameters.unit, parameters.k, path=_path)
    requested = {
        output.name: output.parameters and output.parameters.binary_data for output in request.outputs or ()
    }
    outputs = {
        name: bool(parameters.binary_data_output if requested.get(name) is None else requested[name])
        for name in requested or output_names(contract.schema)
    }
    return Inference(query, request.id, outputs)


def encode(answer: Answer, inference: Inference) -> tuple[bytes, str, dict[str, str]]:
    """Encode an answer: returns its body, its media type and the additional HTTP headers."""
    values = _output_values(answer, inference.query.k or DEFAULT_NUM_ITEMS)
    outputs: list[dict[str, Any]] = []
    binary_data = b""
    for name, is_binary in inference.outputs.items():
        value = values[name]
        output: dict[str, Any] = {
            "name": name,
            "datatype": OUTPUT_TYPES[value.dtype.kind],
            "shape": list(value.shape),
        }
        if is_binary:
            packed = pack(value)
            output["parameters"] = {"binary_data_size": len(packed)}
            binary_data += packed
        else:
            output["data"] = value.ravel().tolist() if value.dtype == object else value.ravel()
        outputs.append(output)
    document = {
        "model_name": answer.model,
        "model_version": answer.version,
        "id": inference.id if inference.id is not None else answer.request_id,
        "parameters": {"variant": answer.variant, "request_id": answer.request_id},
        "outputs": outputs,
    }
    content = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(inference.outputs.values()):
        return content, JSON, {}
    return content + binary_data, BINARY, {HEADER_LENGTH: str(len(content))}


def metadata(name: str, versions: list[str], schema: Schema) -> bytes:
    """The metadata document of a model: its versions, inputs and outputs."""
    data_types = {"number": "FP64", "category": "BYTES", "text": "BYTES"}
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(schema.classes) or 1]}
    if schema.classes:
        output["parameters"] = {"classes": schema.classes}
    ranking = [
        {"name": ITEMS, "datatype": "BYTES", "shape": [-1, -1]},
        {"name": SCORES, "datatype": "FP32", "shape": [-1, -1]},
        {"name": KNOWN, "datatype": "BOOL", "shape": [-1]},
    ]
    return orjson.dumps(
        {
            "name": name,
            "versions": versions,
            "platform": "onnxruntime_onnx",
            "inputs": [
                {"name": item.name, "datatype": data_types[item.contract.type], "shape": [-1, 1]}
                for item in schema.inputs
            ],
            "outputs": ranking if schema.task == "ranking" else [output],
        }
    )


def _output_values(answer: Answer, k: int) -> dict[str, np.ndarray]:
    """The values of all outputs by name."""
    if (ranking := answer.ranking) is not None:
        scores = np.ascontiguousarray(ranking.scores[:, :k])
        return {ITEMS: ranking.items[:, :k], SCORES: scores, KNOWN: ranking.known}
    assert answer.probabilities is not None
    return {OUTPUT: answer.probabilities.astype("<f4").reshape(len(answer.probabilities), -1)}


def _path(location: Location) -> str:
    """A location as text, with cells as values of inputs: `inputs.age.3` instead of `rows.3.age`."""
    match location:
        case ("rows", row, column):
            return f"inputs.{column}.{row}"
    return dotted(location)


def _json_length(text: str, body_length: int) -> int:
    """The value of HEADER_LENGTH. Raises Refused if it is not an integer from 0 to `body_length`."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= body_length):
        raise Refused(
            400, f"the header {HEADER_LENGTH} must be an integer from 0 to {body_length}, the body's length"
        )
    return int(text)
