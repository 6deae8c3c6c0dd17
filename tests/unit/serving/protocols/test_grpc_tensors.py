import numpy as np
import orjson
import pytest
from tritonclient.grpc import service_pb2 as messages

from app.serving.gateway import grpc
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
    head, tail = grpc._as_http(request)
    body = orjson.dumps(head)
    return parse(body + tail, str(len(body)), contract)


def test_typed_tensors_are_the_rows(contract):
    request = messages.ModelInferRequest(model_name="income", id="mine", inputs=TYPED)
    request.parameters["unit"].string_param = "user-17"
    inference = read(contract, request)
    assert inference.query.rows == ROWS
    assert (inference.id, inference.query.unit) == ("mine", "user-17")
    assert inference.outputs == {"probability": True}


def test_raw_tensors_are_the_rows(contract):
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
def test_numbers_of_every_type(contract, datatype):
    field = grpc.TYPED[datatype]
    age = tensor("age", datatype, [2, 1], **{field: [39, 52]})
    inference = read(contract, messages.ModelInferRequest(model_name="income", inputs=[age, *TYPED[1:]]))
    assert [row["age"] for row in inference.query.rows] == [39, 52]


@pytest.mark.parametrize(
    ("inputs", "raw", "message"),
    [
        (TYPED, [b""], "raw_input_contents must have a value for each of the 3 inputs"),
        ([tensor("age", "FP16", [1])], [], "'FP16'; known"),
        ([tensor("age", "INT8", [1], int_contents=[1000])], [], "'age'"),
    ],
)
def test_what_cannot_be_put_into_http_is_said(inputs, raw, message):
    with pytest.raises(grpc.Broken, match=message):
        grpc._as_http(messages.ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=raw))


def test_the_answer_is_what_http_says(contract):
    inference = read(contract, messages.ModelInferRequest(model_name="income", inputs=TYPED))
    values = np.array([0.25, 0.83], dtype=np.float32)
    given = Answer(model="income", variant="champion", version="3", request_id="r-1", probabilities=values)
    content, _, headers = encode(given, inference)
    answered = grpc._as_grpc(content, int(headers[HEADER_LENGTH]))
    assert (answered.model_name, answered.model_version, answered.id) == ("income", "3", "r-1")
    assert answered.parameters["variant"].string_param == "champion"
    assert (answered.outputs[0].name, list(answered.outputs[0].shape)) == ("probability", [2, 1])
    np.testing.assert_array_equal(np.frombuffer(answered.raw_output_contents[0], "<f4"), values)
