"""Each action of an endpoint, called with a real bundle, without Ray and without a server."""

import json

import numpy as np
import pytest

from app.serving.gateway.auth import Principal
from app.serving.http import Refused
from app.serving.replica import actions
from app.serving.replica.actions import ACTIONS
from app.serving.replica.feedback_writer import NotStored
from tests.bundles import ROWS
from tests.services import REQUEST_ID, Recorder, call, loaded, run, services

BODY = json.dumps({"rows": ROWS, "unit": "u-1"}).encode()
TENSORS = json.dumps(
    {
        "parameters": {"unit": "u-1"},
        "inputs": [
            {
                "name": name,
                "datatype": "FP64" if isinstance(ROWS[0][name], int) else "BYTES",
                "shape": [len(ROWS), 1],
                "data": [row[name] for row in ROWS],
            }
            for name in ROWS[0]
        ],
    }
).encode()


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("bundles"), champion=50, challenger=50)


def document(response):
    return json.loads(response.body)


def test_the_table_names_every_action():
    assert {path: action.method for path, action in ACTIONS.items()} == {
        "": "GET", "/ready": "GET", "/openapi.json": "GET",
        "/predict": "POST", "/infer": "POST", "/explain": "POST", "/feedback": "POST",
    }  # fmt: skip
    assert {path for path, action in ACTIONS.items() if action.predicts} == {"/predict", "/infer", "/explain"}
    assert {action.scope for action in ACTIONS.values()} == {"predict", "explain", "feedback"}


def test_metadata_names_the_versions_or_the_one_of_the_path(variants):
    prediction_call = call(services(variants))
    assert document(run(actions.metadata(prediction_call)))["versions"] == ["1", "2"]
    prediction_call.version = "2"
    described = document(run(actions.metadata(prediction_call)))
    assert described["versions"] == ["2"]
    assert {tensor["name"] for tensor in described["inputs"]} == set(ROWS[0])


def test_a_ready_model_is_reported_as_ready(variants):
    assert document(run(actions.ready(call(services(variants))))) == {"name": "income", "ready": True}


def test_the_openapi_document_has_feedback_only_where_records_are_kept(variants):
    for recorder, has_feedback in [(None, False), (Recorder(), True)]:
        described = document(run(actions.describe(call(services(variants, recorder=recorder)))))
        assert ("/v2/models/income/feedback" in described["paths"]) is has_feedback


def test_predict_answers_records_and_offers_the_same_predictions(variants):
    parts = services(variants, recorder=Recorder())
    prediction_call = call(parts, BODY)
    prediction_call.principal = Principal("ann", frozenset(), float("inf"))
    answer = document(run(actions.predict(prediction_call)))
    (recorded,), (copy,) = parts.recorder.predictions, parts.shadows.copies
    assert answer["variant"] == recorded.variant == variants.choose("u-1")
    assert [p["positive"] for p in answer["predictions"]] == [p["positive"] for p in recorded.answer]
    np.testing.assert_allclose(
        [p["probability"] for p in answer["predictions"]], [p["probability"] for p in recorded.answer]
    )
    assert (recorded.role, recorded.unit, recorded.principal) == ("served", "u-1", "ann")
    assert (recorded.request_id, recorded.rows) == (REQUEST_ID, ROWS)
    assert (copy.prediction, copy.size_bytes) == (recorded, 100)


def test_infer_records_what_predict_would_have_answered(variants):
    parts = services(variants, recorder=Recorder())
    answer = document(run(actions.infer(call(parts, TENSORS))))
    predicted = document(run(actions.predict(call(services(variants), BODY))))
    (output,) = answer["outputs"]
    assert (output["name"], output["shape"]) == ("probability", [3, 1])
    assert output["data"] == [p["probability"] for p in predicted["predictions"]]
    (recorded,) = parts.recorder.predictions
    assert [p["positive"] for p in recorded.answer] == [p["positive"] for p in predicted["predictions"]]


def test_nothing_is_recorded_or_offered_where_no_records_are_kept(variants):
    parts = services(variants)
    for action, body in [(actions.predict, BODY), (actions.infer, TENSORS)]:
        assert run(action(call(parts, body))).status == 200
    assert parts.shadows.copies == []


def test_a_forced_variant_is_recorded_as_forced(variants):
    parts = services(variants, recorder=Recorder())
    answer = document(run(actions.predict(call(parts, BODY, x_raylway_variant="challenger"))))
    (recorded,) = parts.recorder.predictions
    assert (answer["variant"], recorded.role) == ("challenger", "forced")


def test_explain_sums_to_the_answer_and_is_not_recorded(variants):
    parts = services(variants, recorder=Recorder())
    explained = document(run(actions.explain_prediction(call(parts, BODY))))
    predicted = document(run(actions.predict(call(services(variants), BODY))))
    for row, prediction in zip(explained["explanations"], predicted["predictions"], strict=True):
        log_odds = np.log(prediction["probability"] / (1 - prediction["probability"]))
        assert row["base"] + sum(row["attributions"].values()) == pytest.approx(log_odds, abs=1e-3)
    assert parts.recorder.predictions == []


def test_explain_refuses_too_many_rows(variants):
    body = json.dumps({"rows": ROWS[:1] * 8}).encode()
    assert run(actions.explain_prediction(call(services(variants), body))).status == 200
    wide = services(variants)
    with pytest.raises(Refused, match="too many rows"):
        run(actions.explain_prediction(call(wide, json.dumps({"rows": ROWS * 6}).encode())))


def test_feedback_needs_records(variants):
    with pytest.raises(Refused, match=r"keeps no records \(serving.record\)") as refused:
        run(actions.store_feedback(call(services(variants))))
    assert refused.value.status == 404


def test_feedback_that_cannot_be_stored_is_a_503_to_be_repeated(variants):
    class Away:
        async def find(self, *_):
            raise NotStored

    body = json.dumps({"request_id": "r-0", "reward": 1.0}).encode()
    with pytest.raises(Refused, match="send it again") as refused:
        run(actions.store_feedback(call(services(variants, recorder=Away()), body)))
    assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "1"})
