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
from tests.unit.state.test_records import prediction

BINARY = Schema(name="m", inputs=[], label="y", positive="yes", negatives=["no"])
OPEN = Schema(name="m", inputs=[], label="y", positive="yes")
NUMBERS = Schema(name="m", inputs=[], label="y", positive="1", negatives=["0"])
ABOVE = Schema(name="m", inputs=[], label="y", positive="above 15", negatives=["not above 15"], above=15)
CLASSES = Schema(name="m", inputs=[], label="y", task="classes", classes=["a", "b"])
RANKING = Schema(name="m", inputs=[], label="item", task="ranking")


def parse(outcomes, schema):
    return feedback.parse(json.dumps({"request_id": "r", "outcomes": outcomes}).encode(), schema).outcomes


@pytest.mark.parametrize(
    ("schema", "given", "kept"),
    [
        (BINARY, ["yes", "no", None, True, False], ["yes", "no", None, "yes", "no"]),
        (OPEN, ["yes", "maybe", False], ["yes", "maybe", "not yes"]),
        (NUMBERS, ["1", 0, 1.0, True], ["1", "0", "1", "1"]),
        (ABOVE, [15, 15.5, "above 15", False], ["not above 15", "above 15", "above 15", "not above 15"]),
        (CLASSES, ["a", None, "b"], ["a", None, "b"]),
        (RANKING, [4.5, 3, "item-7"], [4.5, 3.0, "item-7"]),
    ],
)
def test_outcomes_are_kept_as_the_label_spells_them(schema, given, kept):
    assert parse(given, schema) == kept


@pytest.mark.parametrize(
    ("schema", "given", "message"),
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
def test_an_outcome_that_the_label_cannot_have_is_refused(schema, given, message):
    with pytest.raises(Refused) as refused:
        parse([None, given], schema)
    assert refused.value.status == 422
    (violation,) = refused.value.violations
    assert violation["path"] == "outcomes.1"
    assert message in violation["message"]


def principal(name, *scopes):
    return Principal(name, frozenset(scopes), float("inf"))


@pytest.fixture
def say():
    """Give feedback as a principal; returns the status and what was answered."""
    recorder = Recorder(Records(), 10)
    now = time.time()
    Records().add(
        [
            encode(prediction("r", principal="bob", at=now - 60, rows=[{}, {}])),
            encode(prediction("r", principal="ann", at=now - 60, rows=[{}])),
            encode(prediction("old", principal="bob", at=now - 40 * 86_400)),
        ]
    )

    def give(by, request_id="r", **content):
        body = json.dumps({"request_id": request_id, **content}).encode()
        try:
            said = feedback.parse(body, BINARY)
            answer = asyncio.run(feedback.answer(said, "income", by, recorder, Limits()))
        except Refused as refused:
            return refused.status, str(refused)
        return answer.status, json.loads(answer.body)["status"]

    yield give
    recorder.close()


BOB, EVE = principal("bob", "feedback"), principal("eve", "feedback")
ADMIN = principal("root", "feedback", "admin")


def test_a_refused_spelling_is_not_stored_and_the_corrected_one_is(say):
    assert say(BOB, outcomes=["Yes", None])[0] == 422
    assert say(BOB, outcomes=["yes", None]) == (201, "stored")
    assert say(BOB, outcomes=["yes", None]) == (200, "stored before")
    assert say(BOB, outcomes=["no", None])[0] == 409


def test_nobody_speaks_of_somebody_elses_request(say):
    assert say(EVE, reward=0.0) == (202, "unknown request")
    assert say(EVE, reward=0.0) == (202, "unknown request"), "said again it is no more"
    assert say(EVE, reward=0.0, principal="bob")[0] == 403
    assert say(BOB, reward=1.0) == (201, "stored")
    assert say(principal("ann", "feedback"), reward=1.0) == (201, "stored"), "her own, of the same id"
    records = Records()
    assert {(f.principal, f.said["reward"]) for f in records.feedback("income")} == {("bob", 1), ("ann", 1)}
    records.close()


def test_an_admin_speaks_for_others(say):
    assert say(ADMIN, reward=1.0, principal="bob") == (201, "stored")
    assert say(BOB, reward=0.0)[0] == 409


def test_the_number_of_outcomes_and_the_age_are_those_of_the_own_request(say):
    assert say(BOB, outcomes=["yes"]) == (422, "outcomes must have 2 values, one for each row")
    assert say(BOB, request_id="old", reward=1.0)[0] == 410
