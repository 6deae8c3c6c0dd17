"""Interface of the readers of cells, and how they read many cells at once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa

from app.config import Column
from app.data.arrow import value_type
from app.data.cells.rules import NOT_MISSING, BrokenRule, Fault, Faults

MIN_BATCH_SIZE = 16
"""Number of values from which checking them together is faster than one by one."""


class Cells(ABC):
    """Reader of one column's cells under the column's contract.

    A number becomes a float; a missing one is NaN in an array and None from `read`. A category or text
    becomes a str; a missing one is None. Null, NaN, the empty string and the contract's markers are missing.
    """

    dtype: ClassVar[Any]
    """Type of the arrays that cells are read into."""

    def __init__(self, contract: Column, markers: Sequence[str]):
        """`markers` are the texts that stand for a missing value (`data.missing`)."""
        self.contract = contract
        self._markers = {"", *markers}
        self._nullable = contract.nullable

    @abstractmethod
    def read(self, value: Any) -> float | str | None:
        """Read one typed value. Raises BrokenRule if it breaks the contract."""

    @abstractmethod
    def _read_valid(self, values: Sequence[Any]) -> np.ndarray | None:
        """Read many values together if a fast check finds all of them valid; None if `read` must decide."""

    @abstractmethod
    def _read_array(self, column: pa.Array, parse_text: bool) -> tuple[np.ndarray, Faults]:
        """`read_column` for an array that is not dictionary-encoded; `faults` may have empty masks."""

    def _require_nullable(self) -> None:
        if not self._nullable:
            raise BrokenRule(NOT_MISSING)

    def read_all(self, values: Sequence[Any]) -> tuple[np.ndarray, dict[int, str]]:
        """Read typed values: an array (rows,) as `Bundle.predict` takes it, and the broken rule by row."""
        if len(values) >= MIN_BATCH_SIZE and (batch := self._read_valid(values)) is not None:
            return batch, {}
        read = self.read
        try:
            return np.array([read(value) for value in values], dtype=self.dtype), {}
        except BrokenRule:
            pass
        cells: list[float | str | None] = []
        rules: dict[int, str] = {}
        for row, value in enumerate(values):
            try:
                cells.append(read(value))
            except BrokenRule as rule:
                cells.append(None)
                rules[row] = str(rule)
        return np.array(cells, dtype=self.dtype), rules

    def read_column(
        self, column: pa.ChunkedArray | pa.Array, *, parse_text: bool
    ) -> tuple[np.ndarray, Faults]:
        """Read a column of a table: an array (rows,), and the rows that break each rule.

        If `parse_text` is true, a string may spell a number, as in a CSV file. A row that breaks a rule is
        missing in the array, and no row breaks two rules.
        """
        if pa.types.is_dictionary(column.type):
            column = column.cast(value_type(column.type))
        if pa.types.is_null(column.type):
            column = column.cast(pa.large_string())
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        values, faults = self._read_array(column, parse_text)
        return values, [fault for fault in faults if fault.mask.any()]

    def read_series(self, series: pd.Series) -> tuple[np.ndarray, Faults]:
        """Read a column of a data frame, typed value by typed value."""
        try:
            column = None if series.dtype == object else pa.Array.from_pandas(series)
        except pa.ArrowException:  # a type that only pandas has, such as a complex number
            column = None
        if column is not None:
            return self.read_column(column, parse_text=False)
        values, rules = self.read_all(series.tolist())
        masks = {rule: np.zeros(len(series), dtype=bool) for rule in rules.values()}
        for row, rule in rules.items():
            masks[rule][row] = True
        return values, [Fault(rule, mask) for rule, mask in masks.items()]
