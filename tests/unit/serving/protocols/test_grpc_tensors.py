import numpy as np
import orjson
import pytest
from tritonclient.grpc import service_pb2 as messages

from app.serving.protocols import grpc_tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.protocols.tensors import HEADER_LENGTH, encode, parse
from tests.bundles import schema


@pytest.fixture
def contract():
    return Contract(schema(), max_rows=5)


def tensor(name, datatype, shape, **contents):
    kind = messages.ModelInferRequest.InferInputTensor
    return kind(name=name, datatype=datatype, shape=shape, contents=messages.InferTensorContents(**contents))


TYPED = [
    tensor("age", "FP64", [2, 1], fp64_contents=[39, 52.5]),
    tensor("education", "BYTES", [2, 1], bytes_contents=[b"Bachelors", b"HS-grad"]),
    tensor("gender", "BYTES", [2], bytes_contents=[b"Male", b"Female"]),
]
ABSENT = {"hours-per-week": None, "workclass": None}
ROWS = [
    {"age": 39.0, "education": "Bachelors", "gender": "Male", **ABSENT},
    {"age": 52.5, "education": "HS-grad", "gender": "Female", **ABSENT},
]


def read(contract, request):
    """The request as the HTTP endpoint parses it."""
    document, binary_data = grpc_tensors.to_http(request)
    content = orjson.dumps(document)
    return parse(content + binary_data, str(len(content)), contract)


def test_typed_tensors_become_rows(contract):
    request = messages.ModelInferRequest(model_name="income", id="mine", inputs=TYPED)
    request.parameters["unit"].string_param = "user-17"
    inference = read(contract, request)
    assert inference.query.rows == ROWS
    assert (inference.id, inference.query.unit) == ("mine", "user-17")
    assert inference.outputs == {"probability": True}


def test_raw_tensors_become_rows(contract):
    bare = [
        messages.ModelInferRequest.InferInputTensor(name=t.name, datatype=t.datatype, shape=t.shape)
        for t in TYPED
    ]
    raw = [np.array([39, 52.5]).tobytes()]
    for tensor_ in TYPED[1:]:
        raw.append(b"".join(len(v).to_bytes(4, "little") + v for v in tensor_.contents.bytes_contents))
    request = messages.ModelInferRequest(model_name="income", inputs=bare, raw_input_contents=raw)
    assert read(contract, request).query.rows == ROWS


@pytest.mark.parametrize("datatype", ["INT8", "INT64", "UINT32", "FP32"])
def test_typed_numbers_of_every_type_become_rows(contract, datatype):
    field = grpc_tensors.CONTENTS[datatype]
    age = tensor("age", datatype, [2, 1], **{field: [39, 52]})
    inference = read(contract, messages.ModelInferRequest(model_name="income", inputs=[age, *TYPED[1:]]))
    assert [row["age"] for row in inference.query.rows] == [39, 52]


@pytest.mark.parametrize(
    ("inputs", "raw", "message"),
    [
        (TYPED, [b""], "raw_input_contents must have one value for each of the 3 inputs, not 1"),
        ([tensor("age", "FP16", [1])], [], "'age' must be one of BOOL, .*, not 'FP16'"),
        ([tensor("age", "INT8", [1], int_contents=[1000])], [], "'age'"),
    ],
)
def test_a_message_without_an_equivalent_in_http_is_refused(inputs, raw, message):
    with pytest.raises(grpc_tensors.InvalidMessage, match=message):
        grpc_tensors.to_http(
            messages.ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=raw)
        )


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_the_number_of_tensors_is_bounded(monkeypatch, field):
    monkeypatch.setattr(grpc_tensors, "MAX_PARTS", 2)
    request = messages.ModelInferRequest(model_name="m")
    for _ in range(3):
        getattr(request, field).add()
    with pytest.raises(grpc_tensors.InvalidMessage, match=f"{field} must have at most 2 entries"):
        grpc_tensors.to_http(request)


def test_an_http_answer_becomes_a_response_with_raw_outputs(contract):
    inference = read(contract, messages.ModelInferRequest(model_name="income", inputs=TYPED))
    values = np.array([0.25, 0.83], dtype=np.float32)
    answer = Answer(model="income", variant="champion", version="3", request_id="r-1", probabilities=values)
    body, _, headers = encode(answer, inference)
    response = grpc_tensors.from_http(body, int(headers[HEADER_LENGTH]))
    assert (response.model_name, response.model_version, response.id) == ("income", "3", "r-1")
    assert response.parameters["variant"].string_param == "champion"
    assert (response.outputs[0].name, list(response.outputs[0].shape)) == ("probability", [2, 1])
    np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[0], "<f4"), values)
