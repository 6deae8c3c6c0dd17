"""Requests to a recommender and its answers, in both protocols."""

from typing import Any

import numpy as np
import orjson
import pytest

from app.bundle.bundle import Bundle
from app.serving.http import Refused
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.traffic.variants import common_schema
from tests.unit.tasks.recommender.example import NUM_ITEMS


@pytest.fixture(scope="module")
def bundle(build) -> Bundle:
    return build("recommender", "mf").bundle


@pytest.fixture(scope="module")
def contract(bundle) -> Contract:
    return Contract(bundle.schema, max_rows=8)


def parse(contract: Contract, **request: Any):
    return rows.parse(orjson.dumps(request), contract)


def answer_of(bundle: Bundle, *users: str) -> Answer:
    ranking = bundle.rank({"who": np.array(users, dtype=object)})
    return Answer(model="films", variant="champion", version="1", request_id="r", ranking=ranking)


def encoded(answer: Answer, *rest: Any) -> bytes:
    return rows.encode(answer, rows.predictions(answer, *rest))


def test_k_is_the_number_of_items_in_the_answer(contract):
    assert parse(contract, rows=[{"who": "u1"}]).k is None
    assert parse(contract, rows=[{"who": "u1"}], k=3).k == 3
    assert parse(contract, rows=[{"who": "nobody"}], k=None).k is None


@pytest.mark.parametrize("k", [0, -1, NUM_ITEMS + 1, 2.5, "3", True])
def test_an_invalid_k_is_refused(contract, k):
    with pytest.raises(Refused) as refused:
        parse(contract, rows=[{"who": "u1"}], k=k)
    assert refused.value.status == 422
    assert refused.value.violations[0]["path"] == "k"


@pytest.mark.parametrize("row", [{}, {"who": 17}, {"who": None}, {"who": "u1", "what": "i1"}], ids=str)
def test_a_row_must_be_a_user_and_nothing_else(contract, row):
    with pytest.raises(Refused) as refused:
        parse(contract, rows=[row])
    assert refused.value.status == 422


def test_an_unknown_user_is_refused_if_the_contract_refuses_unseen_values(bundle):
    (user,) = bundle.schema.inputs
    strict = user.model_copy(update={"contract": user.contract.model_copy(update={"unseen": "refuse"})})
    contract = Contract(bundle.schema.model_copy(update={"inputs": [strict]}), max_rows=8)
    parse(contract, rows=[{"who": "u1"}])
    with pytest.raises(Refused, match="breaks the contract"):
        parse(contract, rows=[{"who": "nobody"}])


def test_the_answer_has_the_best_items_first_and_marks_unknown_users(bundle):
    answer = answer_of(bundle, "u1", "nobody")
    document = orjson.loads(encoded(answer, bundle.schema, 3))
    assert document["item"] == "what"
    known, unknown = document["predictions"]
    assert known["known"] is True
    assert len(known["items"]) == len(known["scores"]) == 3
    assert known["scores"] == sorted(known["scores"], reverse=True)
    assert (unknown["known"], unknown["items"]) == (False, answer.ranking.items[1, :3].tolist())
    ten = orjson.loads(encoded(answer_of(bundle, "u1"), bundle.schema))["predictions"][0]
    assert len(ten["items"]) == 10


def test_a_user_with_many_seen_items_gets_the_remaining_ones(bundle):
    (prediction,) = orjson.loads(encoded(answer_of(bundle, "u1"), bundle.schema, NUM_ITEMS))["predictions"]
    assert len(prediction["items"]) == len(prediction["scores"]) == NUM_ITEMS - 11
    assert "" not in prediction["items"]


@pytest.mark.parametrize("binary", [False, True])
def test_a_request_of_the_open_inference_protocol_is_answered(bundle, contract, binary):
    request = {
        "inputs": [{"name": "who", "datatype": "BYTES", "shape": [2, 1], "data": ["u1", "nobody"]}],
        "parameters": {"k": 2, "binary_data_output": binary},
    }
    inference = tensors.parse(orjson.dumps(request), None, contract)
    body, _, headers = tensors.encode(answer_of(bundle, "u1", "nobody"), inference)
    end = int(headers.get(tensors.HEADER_LENGTH, len(body)))
    items, scores, known = orjson.loads(body[:end])["outputs"]
    expected = bundle.rank({"who": np.array(["u1", "nobody"], dtype=object)})
    assert [(o["name"], o["datatype"], o["shape"]) for o in (items, scores, known)] == [
        ("items", "BYTES", [2, 2]), ("scores", "FP32", [2, 2]), ("known", "BOOL", [2])
    ]  # fmt: skip
    if binary:
        sizes = [o["parameters"]["binary_data_size"] for o in (items, scores, known)]
        assert sum(sizes) == len(body) - end
        first = len(expected.items[0, 0])
        assert body[end + 4 : end + 4 + first].decode() == expected.items[0, 0]
        values = np.frombuffer(body[end + sizes[0] :][: sizes[1]], "<f4")
        assert body[-2:] == b"\x01\x00"
    else:
        assert items["data"] == expected.items[:, :2].ravel().tolist()
        assert known["data"] == [True, False]
        values = np.array(scores["data"], dtype=np.float32)
    np.testing.assert_array_equal(values, expected.scores[:, :2].ravel())


def test_an_unknown_output_is_refused(contract):
    request = {
        "inputs": [{"name": "who", "datatype": "BYTES", "shape": [1], "data": ["u1"]}],
        "outputs": [{"name": "probability"}],
    }
    with pytest.raises(Refused) as refused:
        tensors.parse(orjson.dumps(request), None, contract)
    assert "items, scores, known" in refused.value.violations[0]["message"]
    request["outputs"] = [{"name": "items"}]
    assert tensors.parse(orjson.dumps(request), None, contract).outputs == {"items": False}


def test_metadata_names_the_outputs(bundle):
    schema = bundle.schema
    document = orjson.loads(tensors.metadata("films", ["1"], schema))
    assert [o["name"] for o in document["outputs"]] == ["items", "scores", "known"]
    assert common_schema({"a": schema, "b": schema.model_copy(update={"num_items": 7})}).num_items == 7
