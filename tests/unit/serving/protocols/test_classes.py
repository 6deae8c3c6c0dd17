"""Requests to a text classifier and its answers, in both protocols."""

import numpy as np
import orjson
import pytest

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.errors import UserError
from app.serving.http import Refused
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.traffic.variants import common_schema
from tests.texts import CLASSES


@pytest.fixture(scope="module")
def bundle(build) -> Bundle:
    return build("text", "text_classifier").bundle


def answer_of(bundle: Bundle, texts: list[dict]) -> Answer:
    probabilities = bundle.predict(columns_of(bundle.schema, texts))
    return Answer(model="moods", variant="a", version="1", request_id="r", probabilities=probabilities)


def test_the_answer_has_the_label_and_a_probability_for_each_class(bundle):
    answer = answer_of(bundle, [{"text": "a good day"}, {"text": "awful"}])
    document = orjson.loads(rows.encode(answer, rows.predictions(answer, bundle.schema)))
    assert document["label"] == {"column": "mood", "classes": CLASSES}
    for prediction, row in zip(document["predictions"], answer.probabilities, strict=True):
        assert list(prediction["probabilities"]) == CLASSES
        assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist())
        assert prediction["label"] == CLASSES[row.argmax()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must not be missing"),
        ("x" * 201, "at most 200 characters"),
        (7, "must be a string"),
        (None, "must not be missing"),
    ],
)
def test_a_text_that_breaks_the_contract_is_refused(bundle, text, message):
    with pytest.raises(Refused) as caught:
        rows.parse(orjson.dumps({"rows": [{"text": text}]}), Contract(bundle.schema, 8))
    (violation,) = caught.value.violations
    assert violation["path"] == "rows.0.text"
    assert message in violation["message"]


@pytest.mark.parametrize("binary", [False, True])
def test_the_open_inference_protocol_has_a_column_for_each_class(bundle, binary):
    contract = Contract(bundle.schema, 8)
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["a good day", "awful"]}
    request = {"inputs": [tensor], "parameters": {"binary_data_output": binary}}
    inference = tensors.parse(orjson.dumps(request), None, contract)
    answer = answer_of(bundle, inference.query.rows)
    content, _, headers = tensors.encode(answer, inference)
    head = orjson.loads(content[: int(headers.get(tensors.HEADER_LENGTH, len(content)))])
    (output,) = head["outputs"]
    assert output["shape"] == [2, 3]
    if binary:
        values = np.frombuffer(content[-output["parameters"]["binary_data_size"] :], "<f4")
    else:
        values = np.array(output["data"])
    np.testing.assert_allclose(values.reshape(2, 3), answer.probabilities, atol=1e-6)


def test_the_metadata_name_the_classes(bundle):
    document = orjson.loads(tensors.metadata("moods", ["1"], bundle.schema))
    assert document["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
    assert document["outputs"][0]["shape"] == [-1, 3]
    assert document["outputs"][0]["parameters"] == {"classes": CLASSES}


def test_variants_with_other_classes_do_not_fit(bundle):
    other = bundle.schema.model_copy(update={"classes": ["bad", "good"]})
    with pytest.raises(UserError, match=r"differ in label \(mood: bad, fine, good, mood: bad, good\)"):
        common_schema({"a": bundle.schema, "b": other})
