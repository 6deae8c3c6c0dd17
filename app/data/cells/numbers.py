"""Reading the cells of a column of numbers."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from app.config import Number
from app.data.arrow import as_mask, is_numeric, is_string
from app.data.cells.base import Cells
from app.data.cells.rules import (
    IS_NUMBER,
    MAGNITUDE,
    MAX_MAGNITUDE,
    NOT_MISSING,
    BrokenRule,
    Fault,
    Faults,
    range_rule,
)

MISSING_TEXTS = ("NA", "NaN", "nan")
"""Texts for a missing number, as R, pandas and Python write it."""
WHITESPACE = " \t\r\n\f\v"
NUMBER_PATTERN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?i:inf|infinity)")
"""A number as CSV writers spell it, and nothing more (Python's `float` reads 18_0 as 180)."""


class NumberCells(Cells):
    """Reader of numbers. Also missing are MISSING_TEXTS and the numbers that markers spell."""

    dtype = np.float64
    contract: Number

    def __init__(self, contract: Number, markers: Sequence[str] = ()):
        super().__init__(contract, markers)
        self._markers |= set(MISSING_TEXTS)
        self._marker_numbers = {float(m) for m in markers if NUMBER_PATTERN.fullmatch(m.strip(WHITESPACE))}
        self._min = -MAX_MAGNITUDE if contract.min is None else max(-MAX_MAGNITUDE, contract.min)
        self._max = MAX_MAGNITUDE if contract.max is None else min(MAX_MAGNITUDE, contract.max)

    def read(self, value: Any) -> float | None:
        number = value if type(value) is float else self._as_float(value)
        if self._min <= number <= self._max and number not in self._marker_numbers:
            return number
        if number != number or number in self._marker_numbers:
            self._require_nullable()
            return None
        raise BrokenRule(range_rule(self.contract, number))

    def _as_float(self, value: Any) -> float:
        """A typed value as a float; NaN if it is missing. Raises BrokenRule if it is not a number."""
        if isinstance(value, str):
            if value.strip(WHITESPACE) in self._markers:
                return np.nan
            raise BrokenRule(IS_NUMBER)
        if value is None or value is pd.NA or value is pd.NaT:
            return np.nan
        if not isinstance(value, int | float | np.bool_ | np.integer | np.floating | Decimal):
            raise BrokenRule(IS_NUMBER)
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            raise BrokenRule(MAGNITUDE) from None
        except ValueError:  # a signalling NaN of `decimal`
            raise BrokenRule(IS_NUMBER) from None

    def _read_valid(self, values: Sequence[Any]) -> np.ndarray | None:
        """The numbers, if all are int, float or null and within the range."""
        if self._marker_numbers or not set(map(type, values)) <= {int, float, type(None)}:
            return None
        try:
            numbers = np.array(values, dtype=np.float64)
        except OverflowError:
            return None
        valid = (numbers >= self._min) & (numbers <= self._max)
        if self._nullable:
            valid |= np.isnan(numbers)
        return numbers if valid.all() else None

    def _read_array(self, column: pa.Array, parse_text: bool) -> tuple[np.ndarray, Faults]:
        numbers, is_invalid = self._parsed(column, parse_text)
        numbers[np.isin(numbers, list(self._marker_numbers))] = np.nan
        faults = [Fault(IS_NUMBER, is_invalid)]
        if not self._nullable:
            faults.append(Fault(NOT_MISSING, np.isnan(numbers) & ~is_invalid))
        outside = (numbers < self._min) | (numbers > self._max)
        masks: dict[str, np.ndarray] = {}
        for row in np.flatnonzero(outside):
            rule = range_rule(self.contract, numbers[row])
            masks.setdefault(rule, np.zeros(len(column), dtype=bool))[row] = True
        numbers[outside] = np.nan
        return numbers, [*faults, *(Fault(rule, mask) for rule, mask in masks.items())]

    def _parsed(self, column: pa.Array, parse_text: bool) -> tuple[np.ndarray, np.ndarray]:
        """Column as float64 (rows,), with NaN for missing cells, and a mask of cells that are not numbers."""
        is_invalid = np.zeros(len(column), dtype=bool)
        if is_string(column.type):
            text = pc.utf8_trim(column.cast(pa.large_string()), WHITESPACE)
            is_missing = as_mask(pc.is_in(text, pa.array(sorted(self._markers), pa.large_string())))
            is_spelled = as_mask(pc.match_substring_regex(text, rf"\A(?:{NUMBER_PATTERN.pattern})\z"))
            is_spelled &= parse_text & ~is_missing
            is_invalid = as_mask(pc.is_valid(text)) & ~is_missing & ~is_spelled
            column = pc.if_else(pa.array(is_spelled), text, pa.scalar(None, pa.large_string()))
        elif pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        elif not is_numeric(column.type):
            is_invalid = as_mask(pc.is_valid(column))
            column = pa.nulls(len(column), pa.float64())
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers.astype(np.float64), is_invalid
