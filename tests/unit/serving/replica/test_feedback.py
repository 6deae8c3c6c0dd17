import asyncio
import json
import time

import pytest

from app.bundle.schema import Schema
from app.config.serving import Limits
from app.serving.gateway.auth import Principal
from app.serving.http import Refused
from app.serving.replica import feedback
from app.serving.replica.recorder import Recorder
from app.state.records import Records, encode
from tests.records import prediction

BINARY = Schema(name="m", inputs=[], label="y", positive="yes", negatives=["no"])
OPEN = Schema(name="m", inputs=[], label="y", positive="yes")
NUMBERS = Schema(name="m", inputs=[], label="y", positive="1", negatives=["0"])
ABOVE = Schema(name="m", inputs=[], label="y", positive="above 15", negatives=["not above 15"], above=15)
CLASSES = Schema(name="m", inputs=[], label="y", task="classes", classes=["a", "b"])
RANKING = Schema(name="m", inputs=[], label="item", task="ranking")


def parse(outcomes, schema):
    return feedback.parse(json.dumps({"request_id": "r", "outcomes": outcomes}).encode(), schema).outcomes


@pytest.mark.parametrize(
    ("schema", "outcomes", "values"),
    [
        (BINARY, ["yes", "no", None, True, False], ["yes", "no", None, "yes", "no"]),
        (OPEN, ["yes", "maybe", False], ["yes", "maybe", "not yes"]),
        (NUMBERS, ["1", 0, 1.0, True], ["1", "0", "1", "1"]),
        (ABOVE, [15, 15.5, "above 15", False], ["not above 15", "above 15", "above 15", "not above 15"]),
        (CLASSES, ["a", None, "b"], ["a", None, "b"]),
        (RANKING, [4.5, 3, "item-7"], [4.5, 3.0, "item-7"]),
    ],
)
def test_outcomes_become_values_of_the_label(schema, outcomes, values):
    assert parse(outcomes, schema) == values


@pytest.mark.parametrize(
    ("schema", "outcome", "message"),
    [
        (BINARY, "Yes", "must be one of yes, no, or true or false, or null"),
        (BINARY, "maybe", "must be one of yes, no"),
        (BINARY, 1, "must be one of yes, no"),
        (OPEN, " YES", "must be one of yes"),
        (NUMBERS, 2, "must be one of 1, 0"),
        (ABOVE, "20", "or a number, true or false"),
        (CLASSES, "A", "must be one of a, b, or null"),
        (CLASSES, True, "must be one of a, b"),
        (RANKING, True, "must be a number or an item"),
    ],
)
def test_an_outcome_that_the_label_cannot_have_is_refused(schema, outcome, message):
    with pytest.raises(Refused) as refusal:
        parse([None, outcome], schema)
    assert refusal.value.status == 422
    (violation,) = refusal.value.violations
    assert violation["path"] == "outcomes.1"
    assert message in violation["message"]


def principal(name, *scopes):
    return Principal(name, frozenset(scopes), float("inf"))


@pytest.fixture
def send():
    """Sends feedback as a principal; returns the HTTP status, and the feedback's status or the error."""
    recorder = Recorder(Records(), 10)
    now = time.time()
    Records().add(
        [
            encode(prediction("r", principal="bob", at=now - 60, rows=[{}, {}])),
            encode(prediction("r", principal="ann", at=now - 60, rows=[{}])),
            encode(prediction("old", principal="bob", at=now - 40 * 86_400)),
        ]
    )

    def send(sender, request_id="r", **content):
        body = json.dumps({"request_id": request_id, **content}).encode()
        try:
            submission = feedback.parse(body, BINARY)
            response = asyncio.run(feedback.store(submission, "income", sender, recorder, Limits()))
        except Refused as refusal:
            return refusal.status, str(refusal)
        return response.status, json.loads(response.body)["status"]

    yield send
    recorder.close()


BOB, EVE = principal("bob", "feedback"), principal("eve", "feedback")
ADMIN = principal("root", "feedback", "admin")


def test_feedback_without_outcomes_and_reward_is_refused(send):
    assert send(BOB)[0] == 422


def test_a_misspelt_outcome_is_not_stored_and_the_corrected_one_is(send):
    assert send(BOB, outcomes=["Yes", None])[0] == 422
    assert send(BOB, outcomes=["yes", None]) == (201, "stored")
    assert send(BOB, outcomes=["yes", None]) == (200, "stored before")
    assert send(BOB, outcomes=["no", None])[0] == 409


def test_feedback_is_matched_with_the_senders_own_prediction(send):
    assert send(EVE, reward=0.0) == (202, "unknown request")
    assert send(EVE, reward=0.0) == (202, "unknown request"), "sending it again does not store it twice"
    assert send(EVE, reward=0.0, principal="bob")[0] == 403
    assert send(BOB, reward=1.0) == (201, "stored")
    assert send(principal("ann", "feedback"), reward=1.0) == (201, "stored"), "her own request with this id"
    records = Records()
    rewards = {(f.principal, f.content["reward"]) for f in records.feedback("income")}
    assert rewards == {("bob", 1), ("ann", 1)}
    records.close()


def test_an_admin_sends_feedback_for_others(send):
    assert send(ADMIN, reward=1.0, principal="bob") == (201, "stored")
    assert send(BOB, reward=0.0)[0] == 409


def test_the_number_of_outcomes_and_the_age_of_the_prediction_are_checked(send):
    assert send(BOB, outcomes=["yes"]) == (422, "outcomes must have 2 values, one for each row")
    status, error = send(BOB, request_id="old", reward=1.0)
    assert (status, "must be at most 30 days old" in error) == (410, True)
