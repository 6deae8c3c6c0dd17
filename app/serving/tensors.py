"""Requests and answers of the Open Inference Protocol v2 over HTTP, with its binary tensor extension.

A column is an input of its name, of shape [rows] or [rows, 1]: FP64, FP32 or an integer type for a number and
BYTES for a category. NaN and the empty string stand for a missing value, and an input for a nullable column
may be left out. The only output is `probability`, FP32 [rows, 1]. `parameters.unit` is the unit.

https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from app.bundle import OUTPUT, Schema
from app.serving.protocol import (
    MAX_UNIT_LENGTH,
    Answer,
    Contract,
    Location,
    Question,
    Refused,
    dotted,
    refusal,
)

NUMBERS = {
    "FP64": "<f8", "FP32": "<f4",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip
"""The data types of a number and how they lie in memory."""
HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says where the JSON ends and the binary data begins, in bytes."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Parameters(_Part):
    model_config = ConfigDict(extra="allow")  # the protocol lets clients send their own
    unit: Annotated[str, Field(min_length=1, max_length=MAX_UNIT_LENGTH)] | None = None
    binary_data_output: bool = False


class _TensorParameters(_Part):
    model_config = ConfigDict(extra="allow")
    binary_data_size: NonNegativeInt | None = None
    """Bytes of an input in the binary part."""
    binary_data: bool | None = None
    """Whether an output goes to the binary part."""


class _Input(_Part):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: _TensorParameters = _TensorParameters()


class _Output(_Part):
    name: str
    parameters: _TensorParameters = _TensorParameters()


class _Request(_Part):
    id: str | None = None
    inputs: list[_Input]
    outputs: list[_Output] = []
    parameters: _Parameters = _Parameters()


@dataclass(frozen=True)
class Inference:
    """A request that keeps the contract, and how its answer is wanted."""

    question: Question
    id: str | None
    binary: bool
    """The output as raw bytes after the JSON."""


def parse(body: bytes, header_length: str | None, contract: Contract) -> Inference:
    """A request; `header_length` is the value of its HTTP header HEADER_LENGTH, None if it has none.

    Raises Refused with all its violations.
    """
    end = len(body) if header_length is None else _length(header_length, len(body))
    try:
        request = _Request.model_validate_json(body[:end])
    except ValidationError as error:
        raise refusal(error) from None
    columns = _columns(request, memoryview(body)[end:], contract)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    question = contract.check(rows, request.parameters.unit, _path)
    wanted = [each.parameters.binary_data for each in request.outputs] or [None]
    binary = request.parameters.binary_data_output if wanted[-1] is None else wanted[-1]
    return Inference(question, request.id, binary)


def answer(given: Answer, inference: Inference) -> tuple[bytes, dict[str, str]]:
    """The answer's body and its HTTP headers."""
    values = given.probabilities.astype("<f4")
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [len(values), 1]}
    if inference.binary:
        output["parameters"] = {"binary_data_size": values.nbytes}
    else:
        output["data"] = values
    document = {
        "model_name": given.model,
        "model_version": given.version,
        "id": inference.id if inference.id is not None else given.request_id,
        "parameters": {"variant": given.variant, "request_id": given.request_id},
        "outputs": [output],
    }
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not inference.binary:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return head + values.tobytes(), headers


def metadata(name: str, versions: list[str], schema: Schema) -> bytes:
    """What a model takes and gives."""
    kinds = {"number": "FP64", "category": "BYTES"}
    return orjson.dumps(
        {
            "name": name,
            "versions": versions,
            "platform": "onnxruntime_onnx",
            "inputs": [
                {"name": item.name, "datatype": kinds[item.contract.type], "shape": [-1, 1]}
                for item in schema.inputs
            ],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, 1]}],
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


def _columns(request: _Request, binary: memoryview, contract: Contract) -> dict[str, list[Any]]:
    """The values of each input by name; None for what is missing."""
    kinds = {item.name: item.contract.type for item in contract.schema.inputs}
    columns: dict[str, list[Any]] = {}
    wrong: dict[str, str] = {}
    num_rows = next((tensor.shape[0] for tensor in request.inputs if tensor.shape), 0)
    if num_rows > contract.max_rows:
        raise Refused(413, f"too many rows in one request: at most {contract.max_rows}, not {num_rows}")
    for tensor in request.inputs:
        size = tensor.parameters.binary_data_size
        raw, binary = binary[: size or 0], binary[size or 0 :]
        try:
            if tensor.name not in kinds:
                raise ValueError(f"is unknown; allowed: {', '.join(kinds)}")
            if tensor.name in columns:
                raise ValueError("is given twice")
            if tensor.datatype not in (NUMBERS if kinds[tensor.name] == "number" else ("BYTES",)):
                raise ValueError(f"a {kinds[tensor.name]} cannot have the data type {tensor.datatype[:20]}")
            if tensor.shape not in ([num_rows], [num_rows, 1]) or num_rows < 1:
                raise ValueError("the shape must be [rows, 1] or [rows], with the same rows in all inputs")
            if (size is None) == (tensor.data is None):
                raise ValueError("must have exactly one of data and parameters.binary_data_size")
            values = _unpack(raw, tensor.datatype, num_rows) if tensor.data is None else _flat(tensor.data)
            if len(values) != num_rows or len(raw) != (size or 0):
                raise ValueError(f"must hold {num_rows} values, as its shape says")
            columns[tensor.name] = [None if value == "" or value != value else value for value in values]
        except ValueError as error:
            wrong[tensor.name] = str(error)
    if binary:
        raise Refused(400, f"{len(binary)} bytes are left over after the binary data of all inputs")
    for item in contract.schema.inputs:
        if not item.contract.nullable and item.name not in columns:
            wrong.setdefault(item.name, "must be given")
    violations = [{"path": dotted(("inputs", name)), "message": why} for name, why in wrong.items()]
    for output in request.outputs:
        if output.name != OUTPUT:
            violations.append(
                {"path": dotted(("outputs", output.name)), "message": f"is unknown; allowed: {OUTPUT}"}
            )
    if violations:
        raise Refused(422, f"the request breaks the contract in {len(violations)} places", violations)
    return columns


def _flat(data: list[Any]) -> list[Any]:
    """[[1], [2]] is as good as [1, 2]."""
    return [v[0] if isinstance(v, list) and len(v) == 1 else v for v in data]


def _unpack(raw: memoryview, datatype: str, num_rows: int) -> list[Any]:
    """Little endian numbers, or strings each after its length in 4 bytes. Raises ValueError."""
    if datatype in NUMBERS:
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
