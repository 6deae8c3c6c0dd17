"""Reading the cells of a column of categories or texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from app.config import Category, Text
from app.data.arrow import as_mask, is_string
from app.data.cells.base import Cells
from app.data.cells.rules import (
    IS_STRING,
    IS_UNICODE,
    NOT_MISSING,
    BrokenRule,
    Fault,
    Faults,
    length_rule,
    values_rule,
)


class StringCells(Cells):
    """Reader of categories and texts."""

    dtype = object

    def __init__(
        self, contract: Category | Text, markers: Sequence[str] = (), allowed: Sequence[str] | None = None
    ):
        """`allowed` are the values that a category may have; None allows any."""
        super().__init__(contract, markers)
        self._max_characters = contract.max_characters if isinstance(contract, Text) else None
        self._allowed = None if allowed is None else [v for v in allowed if v not in self._markers]
        self._allowed_set = frozenset(self._allowed or ())

    def read(self, value: Any) -> str | None:
        if isinstance(value, str):
            if value in self._allowed_set:
                return value
            if value in self._markers:
                self._require_nullable()
                return None
            if self._allowed is not None:
                raise BrokenRule(values_rule(self._allowed))
            if self._max_characters is not None and len(value) > self._max_characters:
                raise BrokenRule(length_rule(self._max_characters))
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise BrokenRule(IS_UNICODE)
            return value
        if value is None or value is pd.NA or value != value:
            self._require_nullable()
            return None
        raise BrokenRule(IS_STRING)

    def _read_valid(self, values: Sequence[Any]) -> np.ndarray | None:
        """The strings, if all are allowed ones, or ASCII strings that are not too long and no markers."""
        if set(map(type, values)) != {str}:
            return None
        if self._allowed is not None:
            is_valid = self._allowed_set.issuperset(values)
        else:
            is_valid = self._markers.isdisjoint(values) and "".join(values).isascii()
            is_valid &= self._max_characters is None or max(map(len, values)) <= self._max_characters
        return np.array(values, dtype=object) if is_valid else None

    def _read_array(self, column: pa.Array, parse_text: bool) -> tuple[np.ndarray, Faults]:
        if is_string(column.type):
            values, is_missing, faults = self._strings(column.cast(pa.large_string()))
        else:
            is_invalid = as_mask(pc.is_valid(column))
            values, is_missing = np.full(len(column), None, dtype=object), ~is_invalid
            faults = [Fault(IS_STRING, is_invalid)]
        if not self._nullable:
            faults.append(Fault(NOT_MISSING, is_missing))
        return values, faults

    def _strings(self, strings: pa.Array) -> tuple[np.ndarray, np.ndarray, Faults]:
        """Values with None for missing and invalid ones, object (rows,); mask of the missing ones; faults."""
        is_marker = as_mask(pc.is_in(strings, pa.array(sorted(self._markers), pa.large_string())))
        is_missing = is_marker | ~as_mask(pc.is_valid(strings))
        is_broken, rule = np.zeros(len(strings), dtype=bool), ""
        if self._allowed is not None:
            is_allowed = as_mask(pc.is_in(strings, pa.array(self._allowed, pa.large_string())))
            is_broken, rule = ~is_allowed & ~is_missing, values_rule(self._allowed)
        elif self._max_characters is not None:
            is_long = as_mask(pc.greater(pc.utf8_length(strings), self._max_characters))
            is_broken, rule = is_long & ~is_missing, length_rule(self._max_characters)
        valid = pc.if_else(pa.array(is_missing | is_broken), pa.scalar(None, pa.large_string()), strings)
        return valid.to_numpy(zero_copy_only=False), is_missing, [Fault(rule, is_broken)]
