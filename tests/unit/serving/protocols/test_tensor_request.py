import json

import pytest

from app.serving.http import Refused
from app.serving.protocols.binary import pack_strings
from app.serving.protocols.contract import Contract
from app.serving.protocols.tensor_request import InferenceRequest, output_names, read_columns
from tests.bundles import schema
from tests.unit.serving.protocols.test_tensors import AGE, EDUCATION, GENDER, tensor


@pytest.fixture(scope="module")
def contract():
    return Contract(schema(), max_rows=5)


def read(contract, *inputs, binary=b"", **members):
    request = InferenceRequest.model_validate_json(json.dumps({"inputs": inputs, **members}))
    return read_columns(request, memoryview(binary), contract)


def refusal(*arguments, **members):
    with pytest.raises(Refused) as refused:
        read(*arguments, **members)
    assert refused.value.status == 422
    return {violation["path"]: violation["message"] for violation in refused.value.violations}


def test_inputs_become_columns(contract):
    columns, num_rows = read(contract, AGE, EDUCATION, tensor("gender", "BYTES", [["Male"], "Female"]))
    assert num_rows == 2
    assert columns == {
        "age": [39, 52.5],
        "education": ["Bachelors", "HS-grad"],
        "gender": ["Male", "Female"],
    }


@pytest.mark.parametrize(
    ("age", "path", "message"),
    [
        (tensor("age", "FP64", [39, 40, 41], shape=[2, 1]), "inputs.age", "must have 2 values"),
        (tensor("age", "FP64", [39], shape=[2, 1]), "inputs.age", "must have 2 values"),
        (tensor("age", "FP64", [39]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[1, 2]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[2, 1, 1]), "inputs.age", "the shape must be"),
        (tensor("age", "FP64", [39, 40], shape=[-2]), "inputs.age", "the shape must be"),
        (
            tensor("age", "BYTES", ["39", "40"]),
            "inputs.age",
            "the data type of a number must be one of FP64, FP32, BOOL, INT8, ",
        ),
        (tensor("age", "FP64", [39, 40]) | {"data": None}, "inputs.age", "must have exactly one of data"),
        (AGE | {"parameters": {"binary_data_size": 0}}, "inputs.age", "must have exactly one of data"),
        (AGE | {"name": "years"}, "inputs.years", "is unknown; allowed: age,"),
        (AGE | {"name": "gender", "datatype": "BYTES"}, "inputs.gender", "must be sent once, not twice"),
    ],
)
def test_an_invalid_tensor_is_refused_by_name(contract, age, path, message):
    assert refusal(contract, EDUCATION, GENDER, age)[path].startswith(message)


def test_an_unknown_data_type_is_named(contract):
    messages = refusal(contract, EDUCATION, GENDER, tensor("age", "FP16", [39, 40]))
    assert messages["inputs.age"].endswith("UINT64, not FP16")


@pytest.mark.parametrize(
    ("datatype", "content", "size_bytes", "message"),
    [
        ("FP64", b"\0" * 15, 15, "buffer size"),
        ("FP64", b"\0" * 8, 8, "must have 2 values"),
        ("FP64", b"\0" * 24, 24, "must have 2 values"),
        ("FP64", b"\0" * 8, 16, "must have 2 values"),
        ("FP64", b"", 0, "must have 2 values"),
        ("BYTES", b"\1\0\0", 3, "its binary data ends within a length"),
        ("BYTES", pack_strings([b"Male"]) + b"\xff\xff\xff\xff", 12, "its binary data ends within a string"),
        ("BYTES", pack_strings([b"Male"]), 8, "must have 2 values"),
        ("BYTES", pack_strings([b"Male"] * 3), 24, "must have 2 values"),
        ("BYTES", pack_strings([b"Male", b"\xff"]), 13, "value 1 is not UTF-8"),
    ],
)
def test_binary_data_outside_their_bounds_are_refused(contract, datatype, content, size_bytes, message):
    name = "age" if datatype == "FP64" else "gender"
    others = [member for member in (AGE, EDUCATION, GENDER) if member["name"] != name]
    invalid = tensor(name, datatype, [0, 0], binary_data_size=size_bytes)
    messages = refusal(contract, *others, invalid, binary=content)
    assert list(messages) == [f"inputs.{name}"]
    assert messages[f"inputs.{name}"].startswith(message)


def test_binary_data_without_an_input_are_refused(contract):
    with pytest.raises(Refused, match="8 bytes are left after the binary data") as refused:
        read(contract, AGE, EDUCATION, GENDER, binary=b"\0" * 8)
    assert refused.value.status == 400


def test_a_missing_input_is_refused_unless_its_column_is_nullable(contract):
    assert refusal(contract, AGE) == {"inputs.education": "must be given", "inputs.gender": "must be given"}


def test_an_unknown_output_is_refused(contract):
    messages = refusal(contract, AGE, EDUCATION, GENDER, outputs=[{"name": "score"}])
    assert messages == {"outputs.score": "is unknown; allowed: probability"}


def test_outputs_of_a_recommender():
    assert output_names(schema()) == ["probability"]
    assert output_names(schema().model_copy(update={"task": "ranking"})) == ["items", "scores", "known"]
