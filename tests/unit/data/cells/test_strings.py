import numpy as np
import pytest

from app.config import Category, Text
from app.data.cells.rules import BrokenRule
from app.data.cells.strings import StringCells


def test_texts_for_missing_numbers_are_values_of_a_category():
    cells = StringCells(Category(type="category"), ["?"])
    values = ["NA", "nan", "null", "N/A", " "]
    assert [cells.read(value) for value in values] == values


@pytest.mark.parametrize("value", [None, np.nan, "", "?"])
def test_missing_values(value):
    assert StringCells(Category(type="category", nullable=True), ["?"]).read(value) is None
    with pytest.raises(BrokenRule, match=r"^must not be missing$"):
        StringCells(Category(type="category"), ["?"]).read(value)


@pytest.mark.parametrize(
    ("value", "rule"),
    [("\ud800", "must be valid Unicode"), (7, "must be a string"), (b"a", "must be a string")],
)
def test_values_that_are_not_strings(value, rule):
    with pytest.raises(BrokenRule, match=f"^{rule}$"):
        StringCells(Category(type="category")).read(value)


def test_a_category_must_be_an_allowed_value():
    cells = StringCells(Category(type="category"), ["?"], ["a", "b", "?"])
    assert cells.read("a") == "a"
    with pytest.raises(BrokenRule, match=r"^must be one of a, b$"):
        cells.read("c")
    with pytest.raises(BrokenRule, match=r"^must not be missing$"):
        cells.read("?")  # a marker is missing even if the contract allows it as a value


def test_a_text_must_not_be_too_long():
    cells = StringCells(Text(type="text", max_characters=3))
    assert cells.read("abc") == "abc"
    with pytest.raises(BrokenRule, match=r"^must have at most 3 characters$"):
        cells.read("abcd")
