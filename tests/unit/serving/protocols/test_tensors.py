import json
import random

import numpy as np
import pytest

from app.bundle.bundle import OUTPUT
from app.serving.http import Refused
from app.serving.protocols import tensors
from app.serving.protocols.binary import NUMBER_TYPES, pack_strings
from app.serving.protocols.contract import Answer, Contract
from tests.bundles import ROWS, schema


@pytest.fixture(scope="module")
def contract():
    return Contract(schema(), max_rows=5)


def tensor(name, datatype, data, shape=None, **parameters):
    """The JSON of an input; its values are binary data if `parameters` say so."""
    document = {"name": name, "datatype": datatype, "shape": [len(data), 1] if shape is None else shape}
    return document | ({"parameters": parameters} if parameters else {"data": data})


AGE = tensor("age", "FP64", [39, 52.5])
EDUCATION = tensor("education", "BYTES", ["Bachelors", "HS-grad"])
GENDER = tensor("gender", "BYTES", ["Male", "Female"])
ABSENT = {"hours-per-week": None, "workclass": None}
TWO = [
    {"age": 39, "education": "Bachelors", "gender": "Male", **ABSENT},
    {"age": 52.5, "education": "HS-grad", "gender": "Female", **ABSENT},
]


def parse(contract, *inputs, binary=b"", **members):
    """Parse a request with these inputs, binary data and further members."""
    content = json.dumps({"inputs": inputs, **members}).encode()
    return tensors.parse(content + binary, str(len(content)) if binary else None, contract)


def test_json_tensors_become_rows(contract):
    inference = parse(contract, AGE, EDUCATION, GENDER, id="mine", parameters={"unit": "user-17"})
    assert inference.query.rows == TWO
    assert (inference.query.unit, inference.id, inference.outputs) == ("user-17", "mine", {OUTPUT: False})


@pytest.mark.parametrize(
    "age",
    [
        tensor("age", "FP32", [39, 52.5], shape=[2]),
        tensor("age", "FP64", [[39], [52.5]], shape=[2, 1]),
        tensor("age", "FP64", [[39], 52.5], shape=[2]),
    ],
)
def test_numbers_of_any_valid_shape_and_type(contract, age):
    assert parse(contract, age, EDUCATION, GENDER).query.rows == TWO


@pytest.mark.parametrize(("datatype", "dtype"), NUMBER_TYPES.items())
def test_binary_numbers_of_every_type_become_rows(contract, datatype, dtype):
    raw = np.array([39, 52], dtype=dtype).tobytes()
    age = tensor("age", datatype, [0, 0], binary_data_size=len(raw))
    rows = parse(contract, age, EDUCATION, GENDER, binary=raw).query.rows
    assert [row["age"] for row in rows] == ([1, 1] if datatype == "BOOL" else [39, 52])


def test_binary_data_are_in_the_order_of_the_inputs(contract):
    ages, educations = np.array([39, 52.5]).tobytes(), pack_strings([b"Bachelors", b"HS-grad"])
    inference = parse(
        contract,
        tensor("education", "BYTES", [0, 0], binary_data_size=len(educations)),
        GENDER,
        tensor("age", "FP64", [0, 0], binary_data_size=len(ages)),
        binary=educations + ages,
    )
    assert inference.query.rows == TWO


def test_nan_and_empty_strings_are_missing(contract):
    hours, workclasses = np.array([np.nan, 40.0]).tobytes(), pack_strings([b"", "Büro".encode()])
    missing = [
        tensor("hours-per-week", "FP64", [0, 0], binary_data_size=len(hours)),
        tensor("workclass", "BYTES", [0, 0], binary_data_size=len(workclasses)),
    ]
    rows = parse(contract, AGE, EDUCATION, GENDER, *missing, binary=hours + workclasses).query.rows
    assert [row["hours-per-week"] for row in rows] == [None, 40.0]
    assert [row["workclass"] for row in rows] == [None, "Büro"]


@pytest.mark.parametrize(
    ("parameters", "outputs", "binary"),
    [
        ({}, None, False),
        ({"binary_data_output": True}, None, True),
        (
            {"binary_data_output": True},
            [{"name": "probability", "parameters": {"binary_data": False}}],
            False,
        ),
        ({}, [{"name": "probability", "parameters": {"binary_data": True}}], True),
        ({"binary_data_output": True}, [{"name": "probability"}], True),
        ({"priority": 3}, [{"name": "probability"}], False),
    ],
)
def test_the_client_chooses_binary_or_json_outputs(contract, parameters, outputs, binary):
    members = {"parameters": parameters} | ({"outputs": outputs} if outputs else {})
    assert parse(contract, AGE, EDUCATION, GENDER, **members).outputs == {OUTPUT: binary}


def test_optional_members_may_be_null(contract):
    """MLServer's client sends null for members without a value."""
    null = {"parameters": None}
    inputs = [{**member, **null} for member in (AGE, EDUCATION, GENDER)]
    inference = parse(contract, *inputs, id=None, outputs=None, **null)
    assert inference.query.rows == TWO
    assert (inference.id, inference.outputs) == (None, {OUTPUT: False})
    outputs = [{"name": OUTPUT, **null}]
    parameters = {"unit": None, "k": None, "binary_data_output": None, "content_type": "pd", "headers": None}
    inputs = [member | {"parameters": {"binary_data_size": None, "content_type": "np"}} for member in inputs]
    assert parse(contract, *inputs, outputs=outputs, parameters=parameters).outputs == {OUTPUT: False}


@pytest.mark.parametrize("binary", [True, False])
def test_an_answer_is_encoded_as_the_protocol_defines(contract, binary):
    inference = parse(contract, AGE, EDUCATION, GENDER, parameters={"binary_data_output": binary})
    values = np.array([0.25, 0.83], dtype=np.float32)
    answer = Answer(model="income", variant="champion", version="3", request_id="r-1", probabilities=values)
    body, media_type, headers = tensors.encode(answer, inference)
    assert media_type == ("application/octet-stream" if binary else "application/json")
    end = int(headers[tensors.HEADER_LENGTH]) if binary else len(body)
    document = json.loads(body[:end])
    (output,) = document.pop("outputs")
    assert document == {
        "model_name": "income",
        "model_version": "3",
        "id": "r-1",
        "parameters": {"variant": "champion", "request_id": "r-1"},
    }
    assert (output["name"], output["datatype"], output["shape"]) == ("probability", "FP32", [2, 1])
    if binary:
        assert output["parameters"]["binary_data_size"] == len(body) - end
        np.testing.assert_array_equal(np.frombuffer(body[end:], "<f4"), values)
    else:
        np.testing.assert_array_equal(np.array(output["data"], dtype=np.float32), values)


def test_metadata_names_the_columns():
    document = json.loads(tensors.metadata("income", ["1", "2"], schema()))
    assert document["versions"] == ["1", "2"]
    assert document["inputs"][0] == {"name": "age", "datatype": "FP64", "shape": [-1, 1]}
    assert document["inputs"][2] == {"name": "education", "datatype": "BYTES", "shape": [-1, 1]}
    assert document["outputs"] == [{"name": "probability", "datatype": "FP32", "shape": [-1, 1]}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (121, "must be at most 120, not 121"),
        ("x", "must be a number, not 'x'"),
        (None, "must not be missing"),
        ([1, 2], "must be a number, not [1, 2]"),
        (float("inf"), "must be finite, not inf"),
    ],
)
def test_a_violation_names_the_input_and_the_row(contract, value, message):
    with pytest.raises(Refused) as refused:
        parse(contract, EDUCATION, GENDER, tensor("age", "FP64", [39, value]))
    assert refused.value.status == 422
    assert refused.value.violations == [{"path": "inputs.age.1", "message": message}]


@pytest.mark.parametrize(
    ("status", "body", "length"),
    [
        (400, b"", None),
        (400, b"{", None),
        (400, b"{}", "3"),
        (400, b"{}", "-1"),
        (400, b"{}", "1.0"),
        (400, b"{}", "²"),
        (400, b"{}", "9" * 5_000),
        (400, b'{"inputs": []}12345678', "14"),
        (422, b"[]", None),
        (422, b"{}", None),
        (422, b'{"inputs": []}', None),
        (422, b'{"inputs": [{"name": "age", "datatype": "FP64", "shape": [true], "data": [1]}]}', None),
        (422, b'{"inputs": [{"name": "age", "datatype": "FP64", "shape": [2.0], "data": [1]}]}', None),
        (422, b'{"inputs": [], "parameters": {"unit": 17}}', None),
        (413, b'{"inputs": [{"name": "age", "datatype": "FP64", "shape": [9999999999999999999999]}]}', None),
        (413, b'{"inputs": [{"name": "age", "datatype": "FP64", "shape": [6], "data": [1]}]}', None),
    ],
)
def test_a_malformed_body_is_refused_with_the_right_status(contract, status, body, length):
    with pytest.raises(Refused) as refused:
        tensors.parse(body, length, contract)
    assert refused.value.status == status


def test_random_bytes_are_parsed_or_refused(contract):
    generator = random.Random(0)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    ages = np.array(columns.pop("age"), dtype="<f8").tobytes()
    genders = pack_strings(value.encode() for value in columns.pop("gender"))
    inputs = [
        tensor("age", "FP64", ROWS, binary_data_size=len(ages)),
        tensor("gender", "BYTES", ROWS, binary_data_size=len(genders)),
        tensor("education", "BYTES", columns["education"]),
        tensor("hours-per-week", "FP64", columns["hours-per-week"]),
    ]
    content = json.dumps({"inputs": inputs, "id": "1"}).encode()
    valid = content + ages + genders
    statuses = []
    for _ in range(5_000):
        body = bytearray(valid)
        for _ in range(generator.randint(1, 3)):
            start = generator.randrange(len(body))
            fragment = generator.choice([b"9", b"-", b"null", b"[", b'"', b"\xff", generator.randbytes(2)])
            body[start : start + generator.randint(0, 4)] = fragment
        length = generator.choice(
            [len(content), len(content) + len(body) - len(valid), generator.randrange(900)]
        )
        try:
            tensors.parse(bytes(body), str(length), contract)
            statuses.append(200)
        except Refused as refusal:
            json.loads(refusal.body())
            statuses.append(refusal.status)
    assert {200, 400, 422} <= set(statuses) <= {200, 400, 413, 422}
    assert statuses.count(200) < 2_000
