import math
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.config import Number
from app.data.cells.numbers import NumberCells
from app.data.cells.rules import MAX_MAGNITUDE, BrokenRule

MISSING = [
    None, math.nan, pd.NA, pd.NaT, "", " ", "NA", "NaN", -9, -9.0, "-9", np.float32("nan"), Decimal("nan"),
]  # fmt: skip


@pytest.fixture
def cells() -> NumberCells:
    return NumberCells(Number(type="number", nullable=True), ["-9"])


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_values(cells, value):
    assert cells.read(value) is None


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_a_missing_value_breaks_a_contract_that_is_not_nullable(value):
    with pytest.raises(BrokenRule, match=r"^must not be missing$"):
        NumberCells(Number(type="number"), ["-9"]).read(value)


@pytest.mark.parametrize(
    "value", ["39", "n/a", "null", [1], {}, b"1", 1j, pd.Timestamp(0), Decimal("sNaN")], ids=repr
)
def test_values_that_are_not_numbers(cells, value):
    with pytest.raises(BrokenRule, match=r"^must be a number$"):
        cells.read(value)


@pytest.mark.parametrize("value", [10**400, 2 * MAX_MAGNITUDE, -1.797e308])
def test_numbers_beyond_the_maximum_magnitude(cells, value):
    with pytest.raises(BrokenRule, match=r"^must be between -1e\+100 and 1e\+100$"):
        cells.read(value)


def test_infinity_breaks_the_contract(cells):
    with pytest.raises(BrokenRule, match=r"^must be finite$"):
        cells.read(math.inf)


@pytest.mark.parametrize(
    ("value", "number"), [(True, 1), (np.False_, 0), (np.int8(3), 3), (Decimal("1.5"), 1.5)]
)
def test_numeric_types_are_read_as_float(cells, value, number):
    assert cells.read(value) == number
    assert type(cells.read(value)) is float


def test_text_is_a_number_only_where_it_is_parsed(cells):
    column = pa.array(["1", " 2.5 ", "", "1,5"])
    numbers, faults = cells.read_column(column, parse_text=True)
    np.testing.assert_array_equal(numbers, [1, 2.5, np.nan, np.nan])
    assert [(fault.rule, fault.mask.tolist()) for fault in faults] == [
        ("must be a number", [False, False, False, True])
    ]
    numbers, faults = cells.read_column(column, parse_text=False)
    assert np.isnan(numbers).all()
    assert [fault.mask.tolist() for fault in faults] == [[True, True, False, True]]
