"""Parsers of options, and the values that they refuse."""

import pytest

from app.cli import options
from app.errors import UserError


def test_numbers_are_parsed():
    assert options.number("--k", 1, 100, whole=True)("7") == 7
    assert options.number("--hours", 0.01, 100)("0.5") == 0.5
    assert options.number("--hours", 0.01, 100)("1e+1") == 10


@pytest.mark.parametrize(
    ("text", "whole", "message"),
    [
        ("1_0", True, "--k: must be a whole number from 1 to 100; it is '1_0'"),
        ("2.5", True, "--k: must be a whole number from 1 to 100; it is '2.5'"),
        ("101", False, "--k: must be a number from 1 to 100; it is '101'"),
        ("nan", False, "--k: must be a number from 1 to 100; it is 'nan'"),
    ],
)
def test_other_numbers_are_refused(text, whole, message):
    with pytest.raises(UserError) as caught:
        options.number("--k", 1, 100, whole=whole)(text)
    assert str(caught.value) == message


def test_times_are_parsed_as_utc():
    assert options.time("2026-11-01T12:00:00") == options.time("2026-11-01 14:00:00+02:00")
    with pytest.raises(UserError, match="--at: must be a time such as 2026-11-01T12:00:00; it is 'soon'"):
        options.time("soon")


def test_weights_are_parsed_by_variant():
    assert options.weights(["--champion", "90", "--b=.5"]) == {"champion": 90, "b": 0.5}
    assert options.weights([]) == {}


@pytest.mark.parametrize("arguments", [["--champion"], ["champion", "5"], ["--champion", "5", "--b"]])
def test_weights_without_a_name_or_number_are_refused(arguments):
    with pytest.raises(UserError, match="must be variants with their weights"):
        options.weights(arguments)
