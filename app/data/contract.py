"""The data contract: every rule that the rows of a source must keep; all violations are reported together."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from app.config import Category, Data, Number
from app.data import split
from app.data.cells import Cells, cells_of
from app.data.cells.rules import NOT_MISSING
from app.errors import UserError

NUM_EXAMPLES = 3
"""Number of offending values shown for a rule."""
VIOLATION_SCHEMA = pa.schema(
    {"column": pa.string(), "rule": pa.string(), "count": pa.int64(), "examples": pa.list_(pa.string())}
)


@dataclass
class Violation:
    """One rule of one column that some rows break."""

    column: str
    rule: str
    count: int = 0
    """Number of rows that break the rule."""
    examples: list[str] = field(default_factory=list)


def conform(table: pa.Table, data: Data) -> tuple[pd.DataFrame, list[Violation]]:
    """Convert rows to the types of the contract, and list the rules that they break.

    Cells are read by `app.data.cells`: numbers become float64 and categories strings; missing values become
    NaN and None. The label becomes a string, or a number if it has a threshold. `split.TIME` is added if the
    split is by time. The frame is only valid if there are no violations.
    """
    columns: dict[str, pd.Series] = {}
    violations: list[Violation] = []
    for name, cells in _readers(data).items():
        column = table[name]
        if data.label and name == data.label.column and data.label.above is None:
            # Integer and boolean labels are compared with `positive` as text.
            column = column.cast(pa.string())
        values, faults = cells.read_column(column, parse_text=True)
        columns[name] = pd.Series(values, dtype=values.dtype)
        violations += [_violation(name, rule, mask, column) for rule, mask in faults]
    if data.time:
        times = split.parse_times(table[data.time], data.missing)
        columns[split.TIME] = times
        is_text = times.map(lambda value: isinstance(value, str)).to_numpy(dtype=bool)
        for rule, mask in (("must be ISO 8601 or a number", is_text), (NOT_MISSING, times.isna().to_numpy())):
            if mask.any():
                violations.append(_violation(data.time, rule, mask, table[data.time]))
    return pd.DataFrame(columns), violations


def _readers(data: Data) -> dict[str, Cells]:
    readers = {}
    for name, column in data.columns.items():
        allowed = column.values if isinstance(column, Category) else None
        readers[name] = cells_of(column, data.missing, allowed)
    if (label := data.label) is not None:
        nullable = label.missing == "drop"
        if label.above is not None:
            readers[label.column] = cells_of(Number(type="number", nullable=nullable), data.missing)
        else:
            contract = Category(type="category", nullable=nullable)
            readers[label.column] = cells_of(contract, data.missing, label.classes)
    return readers


def _violation(name: str, rule: str, mask: np.ndarray, column: pa.ChunkedArray) -> Violation:
    rows = np.flatnonzero(mask)
    shown = rows[:NUM_EXAMPLES] if rule != NOT_MISSING else rows[:0]
    return Violation(name, rule, len(rows), [repr(column[row].as_py()) for row in shown.tolist()])


def violation_table(table: pa.Table, data: Data) -> pa.Table:
    """The violations of a block, one per row, for `map_batches`."""
    _, violations = conform(table, data)
    return pa.Table.from_pylist([asdict(violation) for violation in violations], VIOLATION_SCHEMA)


def require_no_violations(violations: list[dict[str, Any]], num_rows: int) -> None:
    """Raises UserError that lists the violations if there are any.

    `violations` are the rows of the violation tables of all blocks, which have `num_rows` rows together.
    """
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], set[str]] = {}
    for violation in violations:
        key = (violation["column"], violation["rule"])
        counts[key] += violation["count"]
        examples.setdefault(key, set()).update(violation["examples"])
    if not counts:
        return
    lines = []
    for column, rule in sorted(counts):
        shown = ", ".join(sorted(examples[column, rule])[:NUM_EXAMPLES])
        suffix = f", such as {shown}" if shown else ""
        lines.append(f"{column}: {rule}: {counts[column, rule]:,} of {num_rows:,} rows{suffix}")
    summary = "the data breaks its contract (data.columns); correct the data or the contract:"
    raise UserError(f"{summary} {lines[0]}" if len(lines) == 1 else "\n  ".join([summary, *lines]))
