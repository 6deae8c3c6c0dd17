"""Predictions for the rows of a table, the same as those of an endpoint, but without a server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from app.bundle.bundle import Bundle
from app.bundle.schema import Schema
from app.data.arrow import is_string
from app.data.cells.rules import faults_by_row, with_value
from app.errors import UserError

VIOLATION = "violation"
"""Column with the reason why a row has no prediction."""
NUM_EXAMPLES = 3
"""Number of invalid rows that an error shows."""


def predict(bundle: Bundle, rows: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """A model's predictions for `rows`, with their index.

    The columns are `probability` for a binary label; `label` and the probability of each class for several
    classes; `items` and `scores`, the best `k`, for a recommender. Raises UserError if a column is missing,
    or if a row violates the contract.
    """
    schema = bundle.schema
    if missing := [item.name for item in schema.inputs if item.name not in rows.columns]:
        raise UserError(f"rows: must have the columns {', '.join(missing)}")
    columns, faults = {}, {}
    for name, cells in schema.cells().items():
        columns[name], faults[name] = cells.read_series(rows[name])
    invalid = [
        f"  row {rows.index[row]!r}: {_describe(rows.iloc[row], rules)}"
        for row, rules in enumerate(faults_by_row(faults, len(rows)))
        if rules
    ]
    if invalid:
        num_hidden = len(invalid) - NUM_EXAMPLES
        more = f"\n  and {num_hidden:,} more" if num_hidden > 0 else ""
        raise UserError(
            f"{len(invalid):,} of {len(rows):,} rows break the contract of {schema.name}; correct them or "
            "leave them out:\n" + "\n".join(invalid[:NUM_EXAMPLES]) + more
        )
    return _predictions(bundle, columns, k).set_index(rows.index)


class Predictor:
    """Predicts blocks of a table on a worker."""

    def __init__(self, path: Path, k: int, suffix: str = ""):
        """`suffix` is appended to the names of the prediction columns."""
        self._suffix = suffix
        self._bundle = Bundle(path)
        self._cells = self._bundle.schema.cells()
        self._k = k

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block with its predictions. A row that violates the contract has none, and the
        reason in the column VIOLATION."""
        columns, faults = {}, {}
        for name, cells in self._cells.items():
            columns[name], faults[name] = cells.read_column(block.column(name), parse_text=True)
        rules_by_row = faults_by_row(faults, block.num_rows)
        violations = [self._violation(block, row, rules) for row, rules in enumerate(rules_by_row)]
        valid = np.flatnonzero([violation is None for violation in violations])
        valid_columns = {name: values[valid] for name, values in columns.items()}
        predictions = _predictions(self._bundle, valid_columns, self._k)
        predictions.index = pd.Index(valid)
        predictions = predictions.reindex(range(block.num_rows))
        for name, values in columns.items():
            if values.dtype == np.float64 and is_string(block.column(name).type):
                # Write the numbers of a CSV file as numbers, so that the output can be predicted again.
                numbers = pa.array(values, from_pandas=True)
                block = block.set_column(block.column_names.index(name), name, numbers)
        for name in predictions.columns:
            column = pa.Array.from_pandas(predictions[name], type=_arrow_type(name))
            block = block.append_column(f"{name}{self._suffix}", column)
        return block.append_column(f"{VIOLATION}{self._suffix}", pa.array(violations, pa.string()))

    def _violation(self, block: pa.Table, row: int, rules: list[tuple[str, str]]) -> str | None:
        values = {name: block.column(name)[row].as_py() for name, _ in rules}
        return _describe(values, rules) if rules else None


def prediction_columns(schema: Schema) -> list[str]:
    """Names of the columns that a Predictor without a suffix appends to a table."""
    by_task = {"ranking": ["items", "scores"], "binary": ["probability"]}
    return [*by_task.get(schema.task, ["label", *schema.classes]), VIOLATION]


def _arrow_type(name: str) -> pa.DataType:
    """Type of a prediction column, the same in each block, even in one without a prediction."""
    types = {"items": pa.list_(pa.string()), "scores": pa.list_(pa.float32()), "label": pa.string()}
    return types.get(name, pa.float32())


def _describe(row: Mapping[str, Any], rules: list[tuple[str, str]]) -> str:
    """The rules that a row breaks, with its values."""
    return "; ".join(f"{name}: {with_value(rule, row[name])}" for name, rule in rules)


def _predictions(bundle: Bundle, columns: dict[str, np.ndarray], k: int) -> pd.DataFrame:
    schema = bundle.schema
    if schema.task == "ranking":
        ranking = bundle.rank(columns)
        return pd.DataFrame({"items": _top(ranking.items, k), "scores": _top(ranking.scores, k)})
    probabilities = bundle.predict(columns)
    if schema.task == "binary":
        return pd.DataFrame({"probability": probabilities})
    table = pd.DataFrame(probabilities, columns=schema.classes)
    table.insert(0, "label", np.array(schema.classes)[probabilities.argmax(axis=1)])
    return table


def _top(matrix: np.ndarray, k: int) -> Sequence[list]:
    """The first `k` values of each row."""
    return [row[:k].tolist() for row in matrix]
