"""Contract tests of every reader of cells: one value, many values, a column and a series read the same."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import Category, Number, Text
from app.data.cells import Cells, cells_of
from app.data.cells.base import MIN_BATCH_SIZE
from app.data.cells.numbers import NUMBER_PATTERN, WHITESPACE, NumberCells
from app.data.cells.rules import BrokenRule
from app.data.cells.strings import StringCells

MARKERS = ["?", "-9", "n/a"]
CONTRACTS = [
    Number(type="number"),
    Number(type="number", nullable=True, min=-10, max=1000.5),
    Category(type="category", nullable=True),
    Category(type="category", values=["a", "b", "NA", "?"]),
    Text(type="text", nullable=True, max_characters=4),
]
READERS = [cells_of(contract, MARKERS, getattr(contract, "values", None)) for contract in CONTRACTS]
NUMBER_READERS = READERS[:2]
AWKWARD = [
    "", "?", " ? ", "NA", "NaN", "nan", "-9", "-9.0", "18_0", "0x1F", "1,5", "+5", " 7 ", ".5", "5.", "1e400",
    "-1e400", "1.797e308", "inf", "-Infinity", "٣", "1e", "a", "b", "007", "9" * 400, "true", "n/a", "é",
    "a\0", "\N{NO-BREAK SPACE}1",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(AWKWARD), st.floats().map(str), st.integers().map(str), st.text(max_size=6))
NUMBERS = st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none())


def read_one(cells: Cells, value) -> tuple[str | None, float | str | None]:
    """The broken rule and the value."""
    try:
        return None, cells.read(value)
    except BrokenRule as rule:
        return str(rule), None


def read_one_text(cells: Cells, text: str | None) -> tuple[str | None, float | str | None]:
    """The broken rule and the value of a cell whose text may spell a number."""
    if cells.contract.type == "number" and text is not None:
        stripped = text.strip(WHITESPACE)
        is_marker = stripped in ("", "NA", "NaN", "nan", *MARKERS)
        if not is_marker and NUMBER_PATTERN.fullmatch(stripped):
            return read_one(cells, float(stripped))
    return read_one(cells, text)


def by_row(values: np.ndarray, faults, num_rows: int) -> list[tuple[str | None, float | str | None]]:
    """The broken rule and the value of each row."""
    rules = [None] * num_rows
    for rule, mask in faults:
        for row in np.flatnonzero(mask):
            assert rules[row] is None, "a row breaks one rule"
            rules[row] = rule
    return [
        (rule, None if value is None or value != value else value)
        for rule, value in zip(rules, values.tolist(), strict=True)
    ]


def describe(cells: Cells) -> str:
    return str(cells.contract)


@pytest.mark.parametrize("cells", READERS, ids=describe)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.none() | TEXTS, min_size=1, max_size=40))
def test_a_text_column_reads_as_its_cells(cells, texts):
    expected = [read_one_text(cells, text) for text in texts]
    for string_type in (pa.string(), pa.large_string()):
        column = pa.chunked_array([pa.array(texts[:3], string_type), pa.array(texts[3:], string_type)])
        assert by_row(*cells.read_column(column, parse_text=True), len(texts)) == expected
    column = pa.array(texts, pa.string()).dictionary_encode()
    assert by_row(*cells.read_column(column, parse_text=True), len(texts)) == expected


@pytest.mark.parametrize("cells", READERS, ids=describe)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(NUMBERS | TEXTS, min_size=1, max_size=40))
def test_many_values_read_as_one_by_one(cells, values):
    expected = [read_one(cells, value) for value in values]
    array, rules = cells.read_all(values)
    masks = [(rule, np.arange(len(values)) == row) for row, rule in rules.items()]
    assert by_row(array, masks, len(values)) == expected
    assert by_row(*cells.read_series(pd.Series(values, dtype=object)), len(values)) == expected


@pytest.mark.parametrize("cells", NUMBER_READERS, ids=describe)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats() | st.none(), min_size=1, max_size=40))
def test_a_float_column_reads_as_its_cells(cells, values):
    expected = [read_one(cells, value) for value in values]
    column = pa.array(values, pa.float64())
    assert by_row(*cells.read_column(column, parse_text=True), len(values)) == expected
    assert by_row(*cells.read_series(pd.Series(values, dtype="Float64")), len(values)) == expected


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, None, False]),
        pa.array([2**53 + 1, None, -9], pa.int64()),
        pa.array([2**64 - 1, None, 0], pa.uint64()),
        pa.array([1.5, None, -9.0], pa.float32()),
        pa.array([Decimal("1.25"), None, Decimal(-9)]),
        pa.nulls(3),
    ],
    ids=lambda values: str(values.type),
)
def test_a_number_column_of_any_type_reads_as_its_cells(values):
    cells = cells_of(Number(type="number", nullable=True), MARKERS)
    expected = [read_one(cells, value) for value in values.to_pylist()]
    assert by_row(*cells.read_column(values, parse_text=True), 3) == expected
    assert by_row(*cells.read_series(values.to_pandas()), 3) == expected


@pytest.mark.parametrize("num_values", [1, MIN_BATCH_SIZE - 1, MIN_BATCH_SIZE, 1000])
@pytest.mark.parametrize(("cells", "value"), [(READERS[0], 3), (READERS[3], "b")], ids=["number", "category"])
def test_batches_of_any_size_read_the_same(cells, value, num_values):
    array, rules = cells.read_all([value] * num_values)
    assert (array.tolist(), rules) == ([value] * num_values, {})
    assert array.dtype == cells.dtype


def test_each_contract_has_its_reader():
    assert [type(cells) for cells in READERS] == [NumberCells] * 2 + [StringCells] * 3
