import json
import random
import struct

import numpy as np
import pytest

from app.bundle.bundle import OUTPUT
from app.serving.http import Refused
from app.serving.protocols import tensors
from app.serving.protocols.contract import Answer, Contract
from tests.bundles import ROWS, schema


@pytest.fixture(scope="module")
def contract():
    return Contract(schema(), max_rows=5)


def tensor(name, datatype, data, shape=None, **parameters):
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


def parse(contract, *inputs, binary=b"", **more):
    head = json.dumps({"inputs": inputs, **more}).encode()
    return tensors.parse(head + binary, str(len(head)) if binary else None, contract)


def bytes_of(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


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
def test_shapes_and_types_of_a_number(contract, age):
    assert parse(contract, age, EDUCATION, GENDER).query.rows == TWO


@pytest.mark.parametrize(("datatype", "dtype"), tensors.NUMBERS.items())
def test_binary_numbers_of_every_type(contract, datatype, dtype):
    raw = np.array([39, 52], dtype=dtype).tobytes()
    age = tensor("age", datatype, [0, 0], binary_data_size=len(raw))
    rows = parse(contract, age, EDUCATION, GENDER, binary=raw).query.rows
    assert [row["age"] for row in rows] == ([1, 1] if datatype == "BOOL" else [39, 52])


def test_binary_and_json_tensors_mix_in_the_order_of_the_inputs(contract):
    ages, educations = np.array([39, 52.5]).tobytes(), bytes_of(b"Bachelors", b"HS-grad")
    inference = parse(
        contract,
        tensor("education", "BYTES", [0, 0], binary_data_size=len(educations)),
        GENDER,
        tensor("age", "FP64", [0, 0], binary_data_size=len(ages)),
        binary=educations + ages,
    )
    assert inference.query.rows == TWO


def test_nan_and_the_empty_string_are_missing(contract):
    hours, work = np.array([np.nan, 40.0]).tobytes(), bytes_of(b"", "Büro".encode())
    missing = [
        tensor("hours-per-week", "FP64", [0, 0], binary_data_size=len(hours)),
        tensor("workclass", "BYTES", [0, 0], binary_data_size=len(work)),
    ]
    rows = parse(contract, AGE, EDUCATION, GENDER, *missing, binary=hours + work).query.rows
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
def test_the_client_says_how_it_wants_the_output(contract, parameters, outputs, binary):
    more = {"parameters": parameters} | ({"outputs": outputs} if outputs else {})
    assert parse(contract, AGE, EDUCATION, GENDER, **more).outputs == {OUTPUT: binary}


def test_optional_members_may_be_null(contract):
    """As MLServer's client sends them."""
    nothing = {"parameters": None}
    inputs = [{**each, **nothing} for each in (AGE, EDUCATION, GENDER)]
    inference = parse(contract, *inputs, id=None, outputs=None, **nothing)
    assert inference.query.rows == TWO
    assert (inference.id, inference.outputs) == (None, {OUTPUT: False})
    outputs = [{"name": OUTPUT, **nothing}]
    parameters = {"unit": None, "k": None, "binary_data_output": None, "content_type": "pd", "headers": None}
    inputs = [each | {"parameters": {"binary_data_size": None, "content_type": "np"}} for each in inputs]
    assert parse(contract, *inputs, outputs=outputs, parameters=parameters).outputs == {OUTPUT: False}


@pytest.mark.parametrize("binary", [True, False])
def test_the_answer_can_be_read_as_the_protocol_says(contract, binary):
    inference = parse(contract, AGE, EDUCATION, GENDER, parameters={"binary_data_output": binary})
    values = np.array([0.25, 0.83], dtype=np.float32)
    given = Answer(model="income", variant="champion", version="3", request_id="r-1", probabilities=values)
    body, media_type, headers = tensors.encode(given, inference)
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
    ("age", "path", "message"),
    [
        (
            tensor("age", "FP64", [39, 121]),
            "inputs.age.1",
            "must be at most 120, not 121",
        ),
        (tensor("age", "FP64", [39, "x"]), "inputs.age.1", "must be a number, not 'x'"),
        (tensor("age", "FP64", [39, None]), "inputs.age.1", "must not be missing"),
        (tensor("age", "FP64", [39, [1, 2]]), "inputs.age.1", "must be a number, not [1, 2]"),
        (
            tensor("age", "FP64", [39, float("inf")]),
            "inputs.age.1",
            "must be finite, not inf",
        ),
        (tensor("age", "FP64", [39, 40, 41], shape=[2, 1]), "inputs.age", "must hold 2 values"),
        (tensor("age", "FP64", [39], shape=[2, 1]), "inputs.age", "must hold 2 values"),
        (tensor("age", "FP64", [39]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[1, 2]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[2, 1, 1]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[-2]), "inputs.age", "the shape must be"),
        (tensor("age", "BYTES", ["39", "40"]), "inputs.age", "a number cannot have the data type BYTES"),
        (
            tensor("age", "FP16", [39, 40]),
            "inputs.age",
            "a number cannot have the data type FP16; it takes FP64",
        ),
        (tensor("age", "FP64", [39, 40]) | {"data": None}, "inputs.age", "must have exactly one of data"),
        (AGE | {"parameters": {"binary_data_size": 0}}, "inputs.age", "must have exactly one of data"),
        (AGE | {"name": "years"}, "inputs.years", "is unknown; allowed: age,"),
        (AGE | {"name": "gender", "datatype": "BYTES"}, "inputs.gender", "is given twice"),
    ],
)
def test_each_bad_tensor_is_named(contract, age, path, message):
    with pytest.raises(Refused) as caught:
        parse(contract, EDUCATION, GENDER, age)
    assert caught.value.status == 422
    told = {v["path"]: v["message"] for v in caught.value.violations}
    assert told[path].startswith(message)


@pytest.mark.parametrize(
    ("datatype", "raw", "size", "message"),
    [
        ("FP64", b"\0" * 15, 15, "buffer size"),
        ("FP64", b"\0" * 8, 8, "must hold 2 values"),
        ("FP64", b"\0" * 24, 24, "must hold 2 values"),
        ("FP64", b"\0" * 8, 16, "must hold 2 values"),
        ("FP64", b"", 0, "must hold 2 values"),
        ("BYTES", b"\1\0\0", 3, "its binary data ends within a length"),
        ("BYTES", bytes_of(b"Male") + b"\xff\xff\xff\xff", 12, "its binary data ends within a string"),
        ("BYTES", bytes_of(b"Male"), 8, "must hold 2 values"),
        ("BYTES", bytes_of(b"Male", b"Male", b"Male"), 24, "must hold 2 values"),
        ("BYTES", bytes_of(b"Male", b"\xff"), 13, "value 1 is not UTF-8"),
    ],
)
def test_binary_data_is_bounds_checked(contract, datatype, raw, size, message):
    name = "age" if datatype == "FP64" else "gender"
    others = [each for each in (AGE, EDUCATION, GENDER) if each["name"] != name]
    broken = tensor(name, datatype, [0, 0], binary_data_size=size)
    with pytest.raises(Refused) as caught:
        parse(contract, *others, broken, binary=raw)
    assert caught.value.status == 422
    assert [v["path"] for v in caught.value.violations] == [f"inputs.{name}"]
    assert caught.value.violations[0]["message"].startswith(message)


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
def test_each_bad_body_has_its_status(contract, status, body, length):
    with pytest.raises(Refused) as caught:
        tensors.parse(body, length, contract)
    assert caught.value.status == status


def test_an_unknown_output_is_refused(contract):
    with pytest.raises(Refused) as caught:
        parse(contract, AGE, EDUCATION, GENDER, outputs=[{"name": "score"}])
    assert caught.value.violations == [
        {"path": "outputs.score", "message": "is unknown; allowed: probability"}
    ]


def test_whatever_bytes_come_they_are_taken_or_refused(contract):
    generator = random.Random(0)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    ages = np.array(columns.pop("age"), dtype="<f8").tobytes()
    genders = bytes_of(*(value.encode() for value in columns.pop("gender")))
    inputs = [
        tensor("age", "FP64", ROWS, binary_data_size=len(ages)),
        tensor("gender", "BYTES", ROWS, binary_data_size=len(genders)),
        tensor("education", "BYTES", columns["education"]),
        tensor("hours-per-week", "FP64", columns["hours-per-week"]),
    ]
    head = json.dumps({"inputs": inputs, "id": "1"}).encode()
    good = head + ages + genders
    statuses = []
    for _ in range(5_000):
        body = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(body))
            scrap = generator.choice([b"9", b"-", b"null", b"[", b'"', b"\xff", generator.randbytes(2)])
            body[at : at + generator.randint(0, 4)] = scrap
        length = generator.choice([len(head), len(head) + len(body) - len(good), generator.randrange(900)])
        try:
            tensors.parse(bytes(body), str(length), contract)
            statuses.append(200)
        except Refused as refusal:
            json.loads(refusal.body())
            statuses.append(refusal.status)
    assert {200, 400, 422} <= set(statuses) <= {200, 400, 413, 422}
    assert statuses.count(200) < 2_000
