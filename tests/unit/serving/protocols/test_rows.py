import json
import random

import numpy as np
import pytest

from app.serving.http import MAX_LISTED_VIOLATIONS, Refused
from app.serving.protocols import rows as json_rows
from app.serving.protocols.contract import Answer, Contract
from app.serving.protocols.rows import encode, predictions
from tests.bundles import ROWS, schema

GOOD = {"age": 39, "education": "Bachelors", "gender": "Male"}


@pytest.fixture(scope="module")
def contract():
    return Contract(schema(), max_rows=5)


def refused(contract, body) -> Refused:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused) as caught:
        json_rows.parse(content, contract)
    document = json.loads(caught.value.body())
    assert document["error"] == str(caught.value)
    return caught.value


def test_rows_and_unit_are_parsed(contract):
    query = json_rows.parse(json.dumps({"rows": ROWS, "unit": "user-17"}).encode(), contract)
    assert query.rows == ROWS
    assert query.unit == "user-17"
    assert json_rows.parse(json.dumps({"rows": [GOOD], "unit": None}).encode(), contract).unit is None


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"age": "39"}, "age", "must be a number, not '39'"),
        ({"age": None}, "age", "must not be missing"),
        ({"age": [39]}, "age", "must be a number, not [39]"),
        ({"age": float("nan")}, "age", "must not be missing"),
        ({"age": float("-inf")}, "age", "must be finite, not -inf"),
        ({"age": 10**400}, "age", "must be between -1e+100 and 1e+100, not 1000"),
        (
            {"hours-per-week": 1.797e308},
            "hours-per-week",
            "must be between -1e+100 and 1e+100, not 1.797e+308",
        ),
        ({"age": -0.5}, "age", "must be at least 0, not -0.5"),
        ({"age": 121}, "age", "must be at most 120, not 121"),
        ({"education": "11th"}, "education", "must be one of Bachelors, Doctorate, HS-grad, not '11th'"),
        ({"education": None}, "education", "must not be missing"),
        ({"education": {}}, "education", "must be a string, not {}"),
        ({"gender": "male"}, "gender", "must be one of Female, Male, not 'male'"),
        ({"gender": ""}, "gender", "must not be missing"),
        ({"workclass": 7}, "workclass", "must be a string, not 7"),
        ({"workclass": True}, "workclass", "must be a string, not True"),
        (
            {"colour": "red"},
            "colour",
            "is unknown; allowed: age, hours-per-week, education, workclass, gender",
        ),
    ],
)
def test_a_violation_has_its_location_and_message(contract, change, path, message):
    refusal = refused(contract, {"rows": [GOOD, GOOD | change]})
    assert refusal.status == 422
    (violation,) = refusal.violations
    assert violation["path"] == f"rows.1.{path}"
    assert violation["message"].startswith(message)


def test_all_violations_are_counted_and_a_bounded_number_is_listed(contract):
    refusal = refused(contract, {"rows": [{"age": -1}, {"shoe": 1}], "user": "me"})
    assert [(v["path"], v["message"]) for v in refusal.violations] == [
        ("rows.0.age", "must be at least 0, not -1"),
        ("rows.0.education", "must be given"),
        ("rows.0.gender", "must be given"),
        ("rows.1.age", "must be given"),
        ("rows.1.education", "must be given"),
        ("rows.1.gender", "must be given"),
        ("rows.1.shoe", "is unknown; allowed: age, hours-per-week, education, workclass, gender"),
        ("user", "is unknown; allowed: rows, unit"),
    ]
    many = refused(contract, {"rows": [GOOD | {f"x{i}": 1 for i in range(500)}]})
    assert str(many) == "the request breaks the contract in 500 places"
    assert len(json.loads(many.body())["violations"]) == MAX_LISTED_VIOLATIONS


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b""),
        (400, b"rows"),
        (400, b'{"rows": [{"age": 39'),
        (400, b'{"rows": []} {}'),
        (400, b"\xef\xbb\xbf{}"),
        (400, '{"rows": []}'.encode("utf-16")),
        (400, b'{"rows": [{"education": "\xff"}]}'),
        (400, b'{"rows": [{"education": "\\ud800"}]}'),
        (400, b'{"rows": [{"education": "\\udc00\\ud800"}]}'),
        (400, b'{"rows": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
        (400, b'{"rows": [{"age": 1' + b"0" * 10_000 + b"}]}"),
        (422, b"null"),
        (422, b"[]"),
        (422, b"{}"),
        (422, b'{"rows": {}}'),
        (422, b'{"rows": []}'),
        (422, b'{"rows": 5}'),
        (422, b'{"rows": "row"}'),
        (422, b'{"rows": [null]}'),
        (422, b'{"rows": [[39]]}'),
        (422, {"rows": [GOOD | {"age": 1e308 * 10}]}),
        (422, {"rows": [GOOD], "unit": 17}),
        (422, {"rows": [GOOD], "unit": ""}),
        (422, {"rows": [GOOD], "unit": "x" * 257}),
        (422, {"instances": [GOOD]}),
        (413, {"rows": [GOOD] * 6}),
    ],
)
def test_a_malformed_body_is_refused_with_the_right_status(contract, status, body):
    assert refused(contract, body).status == status


def test_an_unseen_category_is_accepted_if_the_contract_ignores_it(contract):
    (row,) = json_rows.parse(
        json.dumps({"rows": [GOOD | {"workclass": "Astronaut"}]}).encode(), contract
    ).rows
    assert row == GOOD | {"workclass": "Astronaut", "hours-per-week": None}


def test_a_category_without_values_in_training_accepts_no_value():
    inputs = [item.model_copy(update={"known": []}) for item in schema().inputs if item.name == "education"]
    contract = Contract(schema().model_copy(update={"inputs": inputs}), max_rows=5)
    assert refused(contract, {"rows": [{"education": "Bachelors"}]}).status == 422


def test_an_answer_has_the_exact_probability_and_the_decision():
    probabilities = np.array([0.1, 0.5, 0.83], dtype=np.float32)
    answer = Answer(
        model="income", variant="challenger", version="2", request_id="r", probabilities=probabilities
    )
    assert json.loads(encode(answer, predictions(answer, schema()))) == {
        "model": "income",
        "variant": "challenger",
        "version": "2",
        "request_id": "r",
        "label": {"column": "income", "positive": ">50K"},
        "predictions": [
            {"probability": 0.1, "positive": False},
            {"probability": 0.5, "positive": True},
            {"probability": 0.83, "positive": True},
        ],
    }


def test_random_bytes_are_parsed_or_refused(contract):
    generator = random.Random(0)
    valid = json.dumps({"rows": ROWS, "unit": "user-17"}).encode()
    fragments = [
        b"NaN",
        b"1e999",
        b"\\ud800",
        b"null",
        b"[",
        b"{",
        b'"',
        b"\xff",
        b"-",
        b"\0",
        b"true",
        b"9" * 400,
    ]
    statuses = []
    for _ in range(5_000):
        body = bytearray(valid)
        for _ in range(generator.randint(1, 4)):
            start = generator.randrange(len(body))
            body[start : start + generator.randint(0, 8)] = generator.choice(
                [*fragments, generator.randbytes(1)]
            )
        try:
            json_rows.parse(bytes(body), contract)
            statuses.append(200)
        except Refused as refusal:
            json.loads(refusal.body())
            statuses.append(refusal.status)
    assert {200, 400, 422} <= set(statuses) <= {200, 400, 413, 422}
    assert statuses.count(200) < 1_000
