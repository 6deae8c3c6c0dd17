import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from app.serving.http import MAX_LISTED_VIOLATIONS, Refused
from app.serving.protocols import contract as contracts
from app.serving.protocols.contract import (
    ABSENT,
    GENERAL,
    Contract,
    Violation,
    contract_refusal,
    dotted,
    validation_refusal,
)
from tests.bundles import schema

COLUMNS = {"age": [39, 52.5], "education": ["Bachelors", "HS-grad"], "gender": ["Male", "Female"]}


@pytest.fixture
def contract():
    return Contract(schema(), max_rows=5)


def test_columns_become_arrays_and_omitted_nullable_columns_are_missing(contract):
    query = contract.check(COLUMNS, 2, "user-17", None)
    assert query.columns["age"].dtype == np.float64
    assert np.isnan(query.columns["hours-per-week"]).all()
    assert query.rows == [
        {"age": 39, "hours-per-week": None, "education": "Bachelors", "workclass": None, "gender": "Male"},
        {"age": 52.5, "hours-per-week": None, "education": "HS-grad", "workclass": None, "gender": "Female"},
    ]
    assert (query.num_rows, query.unit, query.k) == (2, "user-17", None)


def test_all_violations_are_listed_together_in_the_order_of_the_rows(contract):
    columns = {**COLUMNS, "age": [39, -1], "gender": ["x", "Male"]}
    with pytest.raises(Refused) as refused:
        contract.check(columns, 2, "", None, [Violation(("other",), "is unknown", GENERAL)])
    assert (refused.value.status, str(refused.value)) == (422, "the request breaks the contract in 4 places")
    assert [violation["path"] for violation in refused.value.violations] == [
        "rows.0.gender",
        "rows.1.age",
        "other",
        "unit",
    ]


@pytest.mark.parametrize("unit", ["", "x" * 257, "a\0b", 17, True])
def test_a_unit_is_a_short_string_without_nul(contract, unit):
    with pytest.raises(Refused) as refused:
        contract.check(COLUMNS, 2, unit, None)
    assert refused.value.violations[0]["message"].startswith("must be a string of 1 to 256 characters")


@pytest.mark.parametrize(("k", "is_valid"), [(1, True), (7, True), (0, False), (8, False), (True, False)])
def test_k_is_at_most_the_number_of_items(k, is_valid):
    ranking = Contract(schema().model_copy(update={"task": "ranking", "num_items": 7}), max_rows=5)
    if is_valid:
        assert ranking.check(COLUMNS, 2, None, k).k == k
    else:
        with pytest.raises(Refused, match="1 places"):
            ranking.check(COLUMNS, 2, None, k)


def test_too_many_rows_are_refused_with_413(contract):
    contract.require_num_rows(5)
    with pytest.raises(Refused) as refused:
        contract.require_num_rows(6)
    assert refused.value.status == 413
    assert refused.value.violations[0]["message"] == "must have at most 5 rows, not 6"


def test_messages_have_the_value_only_if_the_request_has_one():
    violations = [Violation(("rows", 0, "a"), "must be a number", value) for value in ("x", ABSENT, GENERAL)]
    messages = [violation["message"] for violation in contract_refusal(violations).violations]
    assert messages == ["must be a number, not 'x'", "must be given", "must be a number"]


def test_a_long_list_of_violations_is_cut():
    violations = [Violation(("rows", row, "a"), "must be a number", row) for row in reversed(range(1_000))]
    refusal = contract_refusal(violations)
    assert "in 1000 places" in str(refusal)
    assert len(refusal.violations) == MAX_LISTED_VIOLATIONS
    assert refusal.violations[0]["path"] == "rows.0.a"


def test_locations_are_dotted_and_bounded():
    assert dotted(("rows", 3, "age")) == "rows.3.age"
    assert dotted(()) == "body"
    assert len(dotted(("x" * 10_000,))) == contracts.MAX_UNIT_LENGTH


class Numbers(BaseModel):
    numbers: list[int]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ("{", 400, "the body must be JSON"),
        ("{}", 422, "in 1 places"),
        ('{"numbers": ["x", "y"]}', 422, "in 2 places"),
        ('{"numbers": [' + ",".join(['"x"'] * 20_000) + "]}", 422, "in 20000 places, too many to list"),
    ],
)
def test_errors_of_pydantic_become_a_refusal(content, status, message):
    with pytest.raises(ValidationError) as invalid:
        Numbers.model_validate_json(content)
    refusal = validation_refusal(invalid.value)
    assert refusal.status == status
    assert message in str(refusal)
