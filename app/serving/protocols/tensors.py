"""Requests and answers of the Open Inference Protocol v2 over HTTP, with its binary tensor extension.

A column is an input of its name, of shape [rows] or [rows, 1]: FP64, FP32, BOOL or an integer type for a
number and BYTES for a category or text. What stands for a missing value is as everywhere (`app.data.cells`):
NaN and the empty string among it. An input for a nullable column may be left out, and an optional member of
the request may be null. The only output is `probability`, FP32: [rows, 1], or a column for each class, whose
names are in the metadata. `parameters.unit` is the unit. A recommender has the outputs `items`, BYTES, and
`scores`, FP32, both [rows, k], and `known`, BOOL [rows]; k is `parameters.k`, or 10. Where fewer than k items
are left to recommend, the last are empty strings.

https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from app.bundle.bundle import ITEMS, KNOWN, OUTPUT, SCORES
from app.bundle.schema import Schema
from app.serving.http import Refused
from app.serving.protocols.contract import (
    DEFAULT_NUM_ITEMS,
    MAX_UNIT_LENGTH,
    UNIT_PATTERN,
    Answer,
    Contract,
    Location,
    Query,
    dotted,
    refusal,
)

NUMBERS = {
    "FP64": "<f8", "FP32": "<f4", "BOOL": "?",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip
"""The data types of a number and how they lie in memory."""
DATA_TYPES = {"f": "FP32", "b": "BOOL", "O": "BYTES"}
"""Of an output, by numpy's kind."""
HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says where the JSON ends and the binary data begins, in bytes."""

MAX_TENSORS = 4096
"""Inputs or outputs of a request: what is wrong with each is told, so a few bytes of it cost a kilobyte."""
MAX_RANK = 8
"""Dimensions of a tensor; more than the contract allows, so that its own message is told."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Parameters(_Part):
    model_config = ConfigDict(extra="allow")  # the protocol lets clients send their own
    unit: Annotated[str, Field(min_length=1, max_length=MAX_UNIT_LENGTH, pattern=UNIT_PATTERN)] | None = None
    k: int | None = None
    binary_data_output: bool | None = None


class _TensorParameters(_Part):
    model_config = ConfigDict(extra="allow")
    binary_data_size: NonNegativeInt | None = None
    """Bytes of an input in the binary part."""
    binary_data: bool | None = None
    """Whether an output goes to the binary part."""


class _Input(_Part):
    name: str
    datatype: str
    shape: Annotated[list[int], Field(max_length=MAX_RANK)]
    data: list[Any] | None = None
    parameters: _TensorParameters | None = None

    @property
    def size(self) -> int | None:
        """Bytes of it in the binary part; None if it is in `data`."""
        return self.parameters.binary_data_size if self.parameters else None


class _Output(_Part):
    name: str
    parameters: _TensorParameters | None = None


class _Request(_Part):
    id: str | None = None
    inputs: Annotated[list[_Input], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[_Output], Field(max_length=MAX_TENSORS)] | None = None
    parameters: _Parameters | None = None


@dataclass(frozen=True)
class Inference:
    """A request that keeps the contract, and how its answer is wanted."""

    query: Query
    id: str | None
    outputs: dict[str, bool]
    """Those wanted, and whether as raw bytes after the JSON."""


def parse(body: bytes, header_length: str | None, contract: Contract) -> Inference:
    """A request; `header_length` is the value of its HTTP header HEADER_LENGTH, None if it has none.

    Raises Refused with all its violations.
    """
    end = len(body) if header_length is None else _length(header_length, len(body))
    try:
        request = _Request.model_validate_json(body[:end])
    except ValidationError as error:
        raise refusal(error) from None
    columns, num_rows = _columns(request, memoryview(body)[end:], contract)
    parameters = request.parameters or _Parameters()
    query = contract.check(columns, num_rows, parameters.unit, parameters.k, path=_path)
    wanted = {each.name: each.parameters and each.parameters.binary_data for each in request.outputs or ()}
    outputs = {
        name: bool(parameters.binary_data_output if wanted.get(name) is None else wanted[name])
        for name in wanted or _outputs(contract.schema)
    }
    return Inference(query, request.id, outputs)


def encode(given: Answer, inference: Inference) -> tuple[bytes, str, dict[str, str]]:
    """The answer's body, its media type and its further HTTP headers."""
    values = _values(given, inference.query.k or DEFAULT_NUM_ITEMS)
    outputs: list[dict[str, Any]] = []
    tail = b""
    for name, binary in inference.outputs.items():
        value = values[name]
        output: dict[str, Any] = {
            "name": name,
            "datatype": DATA_TYPES[value.dtype.kind],
            "shape": list(value.shape),
        }
        if binary:
            raw = _pack(value)
            output["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            output["data"] = value.ravel().tolist() if value.dtype == object else value.ravel()
        outputs.append(output)
    document = {
        "model_name": given.model,
        "model_version": given.version,
        "id": inference.id if inference.id is not None else given.request_id,
        "parameters": {"variant": given.variant, "request_id": given.request_id},
        "outputs": outputs,
    }
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(inference.outputs.values()):
        return head, "application/json", {}
    return head + tail, "application/octet-stream", {HEADER_LENGTH: str(len(head))}


def _values(given: Answer, k: int) -> dict[str, np.ndarray]:
    """The outputs by name."""
    if (ranking := given.ranking) is not None:
        scores = np.ascontiguousarray(ranking.scores[:, :k])
        return {ITEMS: ranking.items[:, :k], SCORES: scores, KNOWN: ranking.known}
    assert given.probabilities is not None
    return {OUTPUT: given.probabilities.astype("<f4").reshape(len(given.probabilities), -1)}


def _pack(values: np.ndarray) -> bytes:
    """As they lie in memory; strings each after its length in 4 bytes."""
    if values.dtype != object:
        return values.tobytes()
    encoded = [str(value).encode() for value in values.ravel()]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def _outputs(schema: Schema) -> list[str]:
    return [ITEMS, SCORES, KNOWN] if schema.task == "ranking" else [OUTPUT]


def metadata(name: str, versions: list[str], schema: Schema) -> bytes:
    """What a model takes and gives."""
    kinds = {"number": "FP64", "category": "BYTES", "text": "BYTES"}
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(schema.classes) or 1]}
    if schema.classes:
        output["parameters"] = {"classes": schema.classes}
    ranked = [
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
                {"name": item.name, "datatype": kinds[item.contract.type], "shape": [-1, 1]}
                for item in schema.inputs
            ],
            "outputs": ranked if schema.task == "ranking" else [output],
        }
    )


def _path(place: Location) -> str:
    """rows.3.age, in terms of tensors."""
    match place:
        case ("rows", index, column):
            return f"inputs.{column}.{index}"
    return dotted(place)


def _length(text: str, limit: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= limit):
        raise Refused(400, f"the header {HEADER_LENGTH} must be a number up to the body's {limit} bytes")
    return int(text)


def _columns(request: _Request, binary: memoryview, contract: Contract) -> tuple[dict[str, list[Any]], int]:
    """The values of each input by name, as they came, and the number of rows."""
    kinds = {item.name: item.contract.type for item in contract.schema.inputs}
    columns: dict[str, list[Any]] = {}
    wrong: dict[str, str] = {}
    num_rows = next((tensor.shape[0] for tensor in request.inputs if tensor.shape), 0)
    if num_rows > contract.max_rows:
        raise Refused(413, f"too many rows in one request: at most {contract.max_rows}, not {num_rows}")
    for tensor in request.inputs:
        size = tensor.size
        raw, binary = binary[: size or 0], binary[size or 0 :]
        try:
            if tensor.name not in kinds:
                raise ValueError(f"is unknown; allowed: {', '.join(kinds)}")
            if tensor.name in columns:
                raise ValueError("is given twice")
            allowed = list(NUMBERS) if kinds[tensor.name] == "number" else ["BYTES"]
            if tensor.datatype not in allowed:
                raise ValueError(
                    f"a {kinds[tensor.name]} cannot have the data type {tensor.datatype[:20]}; it takes "
                    f"{', '.join(allowed)}"
                )
            if tensor.shape not in ([num_rows], [num_rows, 1]) or num_rows < 1:
                raise ValueError("the shape must be [rows, 1] or [rows], with the same rows in all inputs")
            if (size is None) == (tensor.data is None):
                raise ValueError("must have exactly one of data and parameters.binary_data_size")
            values = _unpack(raw, tensor.datatype, num_rows) if tensor.data is None else _flat(tensor.data)
            if len(values) != num_rows or len(raw) != (size or 0):
                raise ValueError(f"must hold {num_rows} values, as its shape says")
            columns[tensor.name] = values
        except ValueError as error:
            wrong[tensor.name] = str(error)
    if binary:
        raise Refused(400, f"{len(binary)} bytes are left over after the binary data of all inputs")
    for item in contract.schema.inputs:
        if not item.contract.nullable and item.name not in columns:
            wrong.setdefault(item.name, "must be given")
    violations = [{"path": dotted(("inputs", name)), "message": why} for name, why in wrong.items()]
    outputs = _outputs(contract.schema)
    for output in request.outputs or ():
        if output.name not in outputs:
            message = f"is unknown; allowed: {', '.join(outputs)}"
            violations.append({"path": dotted(("outputs", output.name)), "message": message})
    if violations:
        raise Refused(422, f"the request breaks the contract in {len(violations)} places", violations)
    return columns, num_rows


def _flat(data: list[Any]) -> list[Any]:
    """[[1], [2]] is as good as [1, 2]."""
    return [v[0] if isinstance(v, list) and len(v) == 1 else v for v in data]


def _unpack(raw: memoryview, datatype: str, num_rows: int) -> list[Any]:
    """Little endian numbers, or strings each after its length in 4 bytes. Raises ValueError."""
    if datatype in NUMBERS:
        if datatype == "BOOL":
            return (np.frombuffer(raw, np.uint8) != 0).tolist()
        return np.frombuffer(raw, NUMBERS[datatype]).astype(np.float64).tolist()
    values: list[Any] = []
    at = 0
    while at < len(raw) and len(values) <= num_rows:
        if len(raw) - at < 4:
            raise ValueError("its binary data ends within a length")
        (length,) = struct.unpack_from("<I", raw, at)
        value = raw[at + 4 : at + 4 + length].tobytes()
        if len(value) < length:
            raise ValueError("its binary data ends within a string")
        try:
            values.append(value.decode())
        except UnicodeDecodeError:
            raise ValueError(f"value {len(values)} is not UTF-8") from None
        at += 4 + length
    return values
