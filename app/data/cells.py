"""Reading a cell: what a value of a table, a request or a tensor is under the contract of its column.

Every reader of values asks `Cells`: training, `predict` on tables, rows of JSON, tensors, gRPC, `api.predict`
and explanations. So what is missing, what is a number and what is refused is the same everywhere.
"""

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from app.config import Column, Number, Text

LIMIT = 1e100
"""Largest magnitude of a number: sums, spans and variances over a table stay finite."""
NOT_A_NUMBER = ("NA", "NaN", "nan")
"""What stands for a missing number in a text, as R, pandas and Python write it."""
SPACE = " \t\r\n\f\v"
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?i:inf|infinity)")
"""A number in a text: what every CSV writer writes, and no more (Python's `float` takes 18_0 for 180)."""
NUM_VALUES = 20
"""Number of allowed values that a rule names."""
NUM_AT_ONCE = 16
"""From this many values on, checking them together is faster than one by one."""

NOT_MISSING = "must not be missing"
IS_NUMBER = "must be a number"
IS_STRING = "must be a string"

Faults = list[tuple[str, np.ndarray]]
"""Rules that are broken, and by which rows: bool (rows,)."""


class Broken(ValueError):
    """A cell breaks the contract; the message is the rule, such as "must be at most 120"."""


class Cells:
    """The reader of one column's cells.

    A number becomes a float, with NaN in arrays and None alone for a missing one. A category or text becomes
    a str, None if it is missing. Missing are null, NaN, the empty string and the contract's markers; of a
    number also the texts NOT_A_NUMBER, and the numbers that markers spell.
    """

    def __init__(self, contract: Column, missing: Sequence[str] = (), allowed: Sequence[str] | None = None):
        """`missing` are the markers (`data.missing`); `allowed` the values that a category may have, None
        for any."""
        self.contract = contract
        self._nullable = contract.nullable
        self._markers = {"", *missing}
        self._dtype: Any = np.float64 if contract.type == "number" else object
        self.read: Callable[[Any], float | str | None]
        """Reads one typed value. Raises Broken."""
        if isinstance(contract, Number):
            self.read = self._number
            self._markers |= set(NOT_A_NUMBER)
            self._codes = {float(m) for m in missing if NUMBER.fullmatch(m.strip(SPACE))}
            self._low = -LIMIT if contract.min is None else max(-LIMIT, contract.min)
            self._high = LIMIT if contract.max is None else min(LIMIT, contract.max)
        else:
            self.read = self._string
            self._most = contract.max_characters if isinstance(contract, Text) else None
            self._values = None if allowed is None else [v for v in allowed if v not in self._markers]
            self._known = frozenset(self._values or ())

    # One value

    def _number(self, value: Any) -> float | None:
        number = value if type(value) is float else self._as_float(value)
        if self._low <= number <= self._high and number not in self._codes:
            return number
        if number != number or number in self._codes:
            self._require_nullable()
            return None
        raise Broken(self._range_rule(number))

    def _as_float(self, value: Any) -> float:
        """A typed value as a float, NaN if it is missing. Raises Broken if it is no number."""
        if isinstance(value, str):
            if value.strip(SPACE) in self._markers:
                return np.nan
            raise Broken(IS_NUMBER)
        if value is None or value is pd.NA or value is pd.NaT:
            return np.nan
        if not isinstance(value, int | float | np.bool_ | np.integer | np.floating | Decimal):
            raise Broken(IS_NUMBER)
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            raise Broken(_within(LIMIT)) from None
        except ValueError:  # a signalling NaN of `decimal`
            raise Broken(IS_NUMBER) from None

    def _string(self, value: Any) -> str | None:
        if isinstance(value, str):
            if value in self._known:
                return value
            if value in self._markers:
                self._require_nullable()
                return None
            if self._values is not None:
                raise Broken(self._values_rule())
            if self._most is not None and len(value) > self._most:
                raise Broken(_at_most(self._most))
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise Broken("must be valid Unicode")
            return value
        if value is None or value is pd.NA or value != value:
            self._require_nullable()
            return None
        raise Broken(IS_STRING)

    def _require_nullable(self) -> None:
        if not self._nullable:
            raise Broken(NOT_MISSING)

    # Many values

    def read_all(self, values: Sequence[Any]) -> tuple[np.ndarray, dict[int, str]]:
        """Read typed values: an array (rows,) as `Bundle.predict` takes it, and the broken rule by row."""
        if len(values) >= NUM_AT_ONCE:
            is_number = self.contract.type == "number"
            together = self._numbers_at_once(values) if is_number else self._strings_at_once(values)
            if together is not None:
                return together, {}
        read = self.read
        try:
            return np.array([read(value) for value in values], dtype=self._dtype), {}
        except Broken:
            pass
        found: list[float | str | None] = []
        broken: dict[int, str] = {}
        for row, value in enumerate(values):
            try:
                found.append(read(value))
            except Broken as rule:
                found.append(None)
                broken[row] = str(rule)
        return np.array(found, dtype=self._dtype), broken

    def _numbers_at_once(self, values: Sequence[Any]) -> np.ndarray | None:
        """The numbers if all are plain ones within the range or null, else None."""
        if self._codes or not set(map(type, values)) <= {int, float, type(None)}:
            return None
        try:
            numbers = np.array(values, dtype=np.float64)
        except OverflowError:
            return None
        fine = (numbers >= self._low) & (numbers <= self._high)
        if self._nullable:
            fine |= np.isnan(numbers)
        return numbers if fine.all() else None

    def _strings_at_once(self, values: Sequence[Any]) -> np.ndarray | None:
        """The strings if all are allowed ones and none is a marker, else None."""
        if set(map(type, values)) != {str}:
            return None
        if self._values is not None:
            fine = self._known.issuperset(values)
        else:
            fine = self._markers.isdisjoint(values) and "".join(values).isascii()
            fine &= self._most is None or max(map(len, values)) <= self._most
        return np.array(values, dtype=object) if fine else None

    def read_column(self, column: pa.ChunkedArray | pa.Array, *, text: bool) -> tuple[np.ndarray, Faults]:
        """Read a column of a table: an array (rows,), and the rows that break each rule.

        `text` says that the column is of a file without types, such as CSV, where "39" is a number. A row
        that breaks a rule is missing in the array, and no row breaks two.
        """
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_null(column.type):
            column = column.cast(pa.large_string())
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if isinstance(self.contract, Number):
            return self._number_column(column, text)
        return self._string_column(column)

    def _number_column(self, column: pa.Array, text: bool) -> tuple[np.ndarray, Faults]:
        faults: Faults = []
        no_number = np.zeros(len(column), dtype=bool)
        if is_string(column.type):
            stripped = pc.utf8_trim(column.cast(pa.large_string()), SPACE)
            blank = _mask(pc.is_in(stripped, pa.array(sorted(self._markers), pa.large_string())))
            spelt = _mask(pc.match_substring_regex(stripped, rf"\A(?:{NUMBER.pattern})\z")) & text & ~blank
            no_number = _mask(pc.is_valid(stripped)) & ~blank & ~spelt
            column = pc.if_else(pa.array(spelt), stripped, pa.scalar(None, pa.large_string()))
        elif pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        elif not is_number(column.type):
            no_number = _mask(pc.is_valid(column))
            column = pa.nulls(len(column), pa.float64())
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        numbers[np.isin(numbers, list(self._codes))] = np.nan
        absent = np.isnan(numbers) & ~no_number
        faults.append((IS_NUMBER, no_number))
        if not self._nullable:
            faults.append((NOT_MISSING, absent))
        outside = (numbers < self._low) | (numbers > self._high)
        for row in np.flatnonzero(outside):
            rule = self._range_rule(numbers[row])
            mask = next((mask for name, mask in faults if name == rule), None)
            if mask is None:
                mask = np.zeros(len(column), dtype=bool)
                faults.append((rule, mask))
            mask[row] = True
        numbers[outside] = np.nan
        return numbers, [(rule, mask) for rule, mask in faults if mask.any()]

    def _string_column(self, column: pa.Array) -> tuple[np.ndarray, Faults]:
        if not is_string(column.type):
            fault = _mask(pc.is_valid(column))
            absent = ~fault
            values = np.full(len(column), None, dtype=object)
            faults = [(IS_STRING, fault)]
        else:
            strings = column.cast(pa.large_string())
            marked = _mask(pc.is_in(strings, pa.array(sorted(self._markers), pa.large_string())))
            absent = marked | ~_mask(pc.is_valid(strings))
            fault, rule = np.zeros(len(column), dtype=bool), ""
            if self._values is not None:
                allowed = pc.is_in(strings, pa.array(self._values, pa.large_string()))
                fault, rule = ~_mask(allowed) & ~absent, self._values_rule()
            elif self._most is not None:
                fault = _mask(pc.greater(pc.utf8_length(strings), self._most)) & ~absent
                rule = _at_most(self._most)
            kept = pc.if_else(pa.array(absent | fault), pa.scalar(None, pa.large_string()), strings)
            values = kept.to_numpy(zero_copy_only=False)
            faults = [(rule, fault)]
        if not self._nullable:
            faults.append((NOT_MISSING, absent))
        return values, [(rule, mask) for rule, mask in faults if mask.any()]

    def read_series(self, series: pd.Series) -> tuple[np.ndarray, Faults]:
        """Read a column of a data frame, typed value by typed value."""
        try:
            column = None if series.dtype == object else pa.Array.from_pandas(series)
        except pa.ArrowException:  # a type of pandas alone, such as a complex number
            column = None
        if column is None:
            values, broken = self.read_all(series.tolist())
            rules = {rule: np.zeros(len(series), dtype=bool) for rule in broken.values()}
            for row, rule in broken.items():
                rules[rule][row] = True
            return values, list(rules.items())
        return self.read_column(column, text=False)

    # Rules

    def _range_rule(self, number: float) -> str:
        assert isinstance(self.contract, Number)
        if number in (np.inf, -np.inf):
            return "must be finite"
        if self.contract.min is not None and number < self.contract.min:
            return f"must be at least {_spelt(self.contract.min)}"
        if self.contract.max is not None and number > self.contract.max:
            return f"must be at most {_spelt(self.contract.max)}"
        return _within(LIMIT)

    def _values_rule(self) -> str:
        values = self._values or []
        if not values:
            return "must be missing: training saw no value in this column"
        more = f" and {len(values) - NUM_VALUES} more" if len(values) > NUM_VALUES else ""
        return f"must be one of {', '.join(values[:NUM_VALUES])}{more}"


def told(rule: str, value: Any) -> str:
    """A broken rule with the value that broke it."""
    return rule if rule == NOT_MISSING else f"{rule}, not {short(value)}"


def short(value: Any) -> str:
    """A value for an error, cut if it is long."""
    if isinstance(value, np.generic):
        value = value.item()
    return "null" if value is None else reprlib.repr(value)


def table_faults(faults: Mapping[str, Faults], num_rows: int) -> list[list[tuple[str, str]]]:
    """The broken rules by row, each with its column's name; `faults` by column."""
    by_row: list[list[tuple[str, str]]] = [[] for _ in range(num_rows)]
    for name, found in faults.items():
        for rule, mask in found:
            for row in np.flatnonzero(mask):
                by_row[row].append((name, rule))
    return by_row


def is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type is read as numbers: booleans are 0 and 1."""
    is_one = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return pa.types.is_null(kind) or any(is_(kind) for is_ in is_one)


def _mask(array: pa.Array) -> np.ndarray:
    """bool (rows,), false for null."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _within(limit: float) -> str:
    return f"must be between -{limit:g} and {limit:g}"


def _at_most(characters: int) -> str:
    return f"must have at most {characters} characters"


def _spelt(number: float) -> str:
    return f"{number:.15g}"
