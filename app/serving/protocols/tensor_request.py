"""Requests of the Open Inference Protocol v2: the JSON document, and the conversion of tensors to columns.

`app.serving.protocols.tensors` describes the protocol.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from app.bundle.bundle import ITEMS, KNOWN, OUTPUT, SCORES
from app.bundle.schema import Schema
from app.serving.http import Refused
from app.serving.protocols.binary import NUMBER_TYPES, unpack
from app.serving.protocols.contract import MAX_UNIT_LENGTH, UNIT_PATTERN, Contract, dotted, unprocessable

MAX_TENSORS = 4096
"""Maximum number of inputs or outputs in a request. A tensor of a few bytes can cause a violation of 1 kB."""
MAX_RANK = 8
"""Maximum number of dimensions that are parsed; `read_columns` refuses more than two."""


class _Strict(BaseModel):
    """JSON object without unknown members, whose values are not converted between types."""

    model_config = ConfigDict(strict=True, extra="forbid")


class RequestParameters(_Strict):
    """Parameters of a request; the protocol allows others, which are ignored."""

    model_config = ConfigDict(extra="allow")
    unit: Annotated[str, Field(min_length=1, max_length=MAX_UNIT_LENGTH, pattern=UNIT_PATTERN)] | None = None
    k: int | None = None
    """Items per user, of a recommender."""
    binary_data_output: bool | None = None
    """Whether outputs without the parameter `binary_data` are sent as binary data."""


class _TensorParameters(_Strict):
    model_config = ConfigDict(extra="allow")
    binary_data_size: NonNegativeInt | None = None
    """Size in bytes of an input in the binary data."""
    binary_data: bool | None = None
    """Whether an output is sent as binary data."""


class _Input(_Strict):
    name: str
    datatype: str
    shape: Annotated[list[int], Field(max_length=MAX_RANK)]
    data: list[Any] | None = None
    parameters: _TensorParameters | None = None

    @property
    def size_bytes(self) -> int | None:
        """Size in bytes in the binary data; None if the values are in `data`."""
        return self.parameters.binary_data_size if self.parameters else None


class _Output(_Strict):
    name: str
    parameters: _TensorParameters | None = None


class InferenceRequest(_Strict):
    """The JSON document of a request."""

    id: str | None = None
    inputs: Annotated[list[_Input], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[_Output], Field(max_length=MAX_TENSORS)] | None = None
    parameters: RequestParameters | None = None


def output_names(schema: Schema) -> list[str]:
    """Names of the outputs of a model."""
    return [ITEMS, SCORES, KNOWN] if schema.task == "ranking" else [OUTPUT]


def read_columns(
    request: InferenceRequest, binary_data: memoryview, contract: Contract
) -> tuple[dict[str, list[Any]], int]:
    """The values of each input by name, still unchecked, and the number of rows.

    Raises Refused with 413 if the request has too many rows, 400 if binary data is left over, and 422 if its
    tensors do not fit the inputs.
    """
    kinds = {item.name: item.contract.type for item in contract.schema.inputs}
    columns: dict[str, list[Any]] = {}
    errors: dict[str, str] = {}
    num_rows = next((tensor.shape[0] for tensor in request.inputs if tensor.shape), 0)
    if num_rows > contract.max_rows:
        raise Refused(413, f"too many rows in one request: at most {contract.max_rows}, not {num_rows}")
    for tensor in request.inputs:
        size_bytes = tensor.size_bytes or 0
        content, binary_data = binary_data[:size_bytes], binary_data[size_bytes:]
        try:
            if tensor.name in columns:
                raise ValueError("must be sent once, not twice")
            columns[tensor.name] = _values(tensor, content, num_rows, kinds)
        except ValueError as error:
            errors[tensor.name] = str(error)
    if binary_data:
        raise Refused(400, f"{len(binary_data)} bytes are left after the binary data of all inputs")
    for item in contract.schema.inputs:
        if not item.contract.nullable and item.name not in columns:
            errors.setdefault(item.name, "must be given")
    violations = [{"path": dotted(("inputs", name)), "message": error} for name, error in errors.items()]
    allowed = output_names(contract.schema)
    for output in request.outputs or ():
        if output.name not in allowed:
            message = f"is unknown; allowed: {', '.join(allowed)}"
            violations.append({"path": dotted(("outputs", output.name)), "message": message})
    if violations:
        raise unprocessable(len(violations), violations)
    return columns, num_rows


def _values(tensor: _Input, content: memoryview, num_rows: int, kinds: Mapping[str, str]) -> list[Any]:
    """The values of one input; `content` are its binary data and `kinds` the types of all columns by name.

    Raises ValueError if the tensor does not fit its column.
    """
    if tensor.name not in kinds:
        raise ValueError(f"is unknown; allowed: {', '.join(kinds)}")
    kind = kinds[tensor.name]
    allowed = list(NUMBER_TYPES) if kind == "number" else ["BYTES"]
    if tensor.datatype not in allowed:
        raise ValueError(
            f"the data type of a {kind} must be one of {', '.join(allowed)}, not {tensor.datatype[:20]}"
        )
    if tensor.shape not in ([num_rows], [num_rows, 1]) or num_rows < 1:
        raise ValueError("the shape must be [rows, 1] or [rows], with the same rows in all inputs")
    if (tensor.size_bytes is None) == (tensor.data is None):
        raise ValueError("must have exactly one of data and parameters.binary_data_size")
    if tensor.data is None:
        values = unpack(content, tensor.datatype, num_rows)
    else:
        values = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in tensor.data]
    if len(values) != num_rows or len(content) != (tensor.size_bytes or 0):
        raise ValueError(f"must have {num_rows} values to fit its shape")
    return values
