"""Conversion between the gRPC messages and the HTTP bodies of the Open Inference Protocol v2.

Inputs are sent as typed contents or as raw contents; outputs are returned as raw contents. In HTTP all
tensors are binary data.

https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from typing import Any

import numpy as np
import orjson
from tritonclient.grpc import service_pb2 as messages

from app.serving.protocols.binary import NUMBER_TYPES, pack_strings

MAX_PARTS = 10_000
"""Maximum number of inputs, outputs or parameters of a call; in memory they are far larger than encoded."""
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""Field of a typed tensor's values, by data type."""


class InvalidMessage(ValueError):
    """A message that has no equivalent in HTTP; the text is for the client."""


def to_http(request: Any) -> tuple[dict[str, Any], bytes]:
    """Convert a ModelInferRequest to the JSON document and the binary data of an HTTP request.

    Raises InvalidMessage if it has too many parts, or tensors that HTTP cannot express.
    """
    for name in ("inputs", "outputs", "raw_input_contents", "parameters"):
        if len(getattr(request, name)) > MAX_PARTS:
            raise InvalidMessage(f"{name} must have at most {MAX_PARTS} entries")
    raw_contents = list(request.raw_input_contents)
    if raw_contents and len(raw_contents) != len(request.inputs):
        raise InvalidMessage(
            f"raw_input_contents must have one value for each of the {len(request.inputs)} inputs, "
            f"not {len(raw_contents)} values"
        )
    inputs, contents = [], []
    for number, tensor in enumerate(request.inputs):
        content = raw_contents[number] if raw_contents else _packed(tensor)
        description = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        inputs.append(description | {"parameters": {"binary_data_size": len(content)}})
        contents.append(content)
    document: dict[str, Any] = {"inputs": inputs}
    if request.id:
        document["id"] = request.id
    if request.outputs:
        document["outputs"] = [
            {"name": output.name, "parameters": {"binary_data": True}} for output in request.outputs
        ]
    parameters = {name: _value(parameter) for name, parameter in request.parameters.items()}
    document["parameters"] = {**parameters, "binary_data_output": True}
    return document, b"".join(contents)


def from_http(body: bytes, json_length: int) -> Any:
    """Convert the body of an HTTP answer to a ModelInferResponse; its JSON has `json_length` bytes."""
    document = orjson.loads(body[:json_length])
    outputs, raw_contents = [], []
    start = json_length
    for output in document["outputs"]:
        end = start + output["parameters"]["binary_data_size"]
        raw_contents.append(body[start:end])
        start = end
        tensor = messages.ModelInferResponse.InferOutputTensor
        outputs.append(tensor(name=output["name"], datatype=output["datatype"], shape=output["shape"]))
    parameters = {
        name: messages.InferParameter(string_param=value) for name, value in document["parameters"].items()
    }
    return messages.ModelInferResponse(
        model_name=document["model_name"],
        model_version=document["model_version"],
        id=document["id"],
        parameters=parameters,
        outputs=outputs,
        raw_output_contents=raw_contents,
    )


def _packed(tensor: Any) -> bytes:
    """The values of a typed tensor as binary data.

    Raises InvalidMessage if the data type is unknown, or a value is out of its range.
    """
    field = CONTENTS.get(tensor.datatype)
    if field is None:
        raise InvalidMessage(
            f"the data type of the input {tensor.name!r} must be one of {', '.join(CONTENTS)}, "
            f"not {tensor.datatype!r}"
        )
    values = list(getattr(tensor.contents, field))
    if tensor.datatype == "BYTES":
        return pack_strings(values)
    if tensor.datatype == "BOOL":
        return np.array(values, dtype=bool).tobytes()
    try:
        return np.array(values, dtype=NUMBER_TYPES[tensor.datatype]).tobytes()
    except OverflowError as error:
        raise InvalidMessage(f"the input {tensor.name!r}: {error}") from None


def _value(parameter: Any) -> Any:
    field = parameter.WhichOneof("parameter_choice")
    return None if field is None else getattr(parameter, field)
