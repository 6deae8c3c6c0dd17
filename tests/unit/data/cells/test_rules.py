import numpy as np
import pytest

from app.config import Number
from app.data.cells.rules import (
    MAX_SHOWN_VALUES,
    NOT_MISSING,
    Fault,
    faults_by_row,
    range_rule,
    values_rule,
    with_value,
)


@pytest.mark.parametrize(
    ("number", "rule"),
    [
        (np.inf, "must be finite"),
        (-1.0, "must be at least 0"),
        (121.0, "must be at most 120.5"),
    ],
)
def test_range_rule(number, rule):
    assert range_rule(Number(type="number", min=0, max=120.5), number) == rule


def test_values_rule_lists_some_of_many_values():
    assert values_rule(["a", "b"]) == "must be one of a, b"
    assert values_rule([]) == "must be missing: training saw no value in this column"
    values = [str(number) for number in range(MAX_SHOWN_VALUES + 7)]
    assert values_rule(values).endswith("18, 19 and 7 more")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (130, "must be at most 120, not 130"),
        (np.float64(130), "must be at most 120, not 130.0"),
        (None, "must be at most 120, not null"),
        ("x" * 100, "must be at most 120, not 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
    ],
)
def test_with_value_shows_the_value_shortened(value, expected):
    assert with_value("must be at most 120", value) == expected


def test_with_value_does_not_show_a_missing_value():
    assert with_value(NOT_MISSING, None) == NOT_MISSING


def test_faults_by_row():
    faults = {
        "age": [Fault("old", np.array([True, False, True])), Fault("young", np.array([False, False, False]))],
        "town": [Fault("unknown", np.array([True, False, False]))],
    }
    assert faults_by_row(faults, 3) == [[("age", "old"), ("town", "unknown")], [], [("age", "old")]]
