"""The contract: what every row of the source must keep, all violations found at once."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from app.config import Category, Data, Number
from app.data import split
from app.data.cells import NOT_MISSING, Cells
from app.errors import UserError

NUM_EXAMPLES = 3


@dataclass
class Violation:
    """One rule of one column that some rows break."""

    column: str
    rule: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


def conform(table: pa.Table, data: Data) -> tuple[pd.DataFrame, list[Violation]]:
    """The rows as the contract has them, and what breaks it.

    Each cell is what `app.data.cells` reads: numbers become float64 and categories strings, with NaN and None
    for what is missing; the label becomes a string, or a number if it has a threshold. `split.TIME` is added
    if the split goes by it. With violations the frame is not to be used.
    """
    columns: dict[str, pd.Series] = {}
    found: list[Violation] = []
    for name, cells in _readers(data).items():
        column = table[name]
        if data.label and name == data.label.column and data.label.above is None:
            # An integer or boolean label is compared with `positive` as text.
            column = column.cast(pa.string())
        values, faults = cells.read_column(column, text=True)
        columns[name] = pd.Series(values, dtype=values.dtype)
        found += [_violation(name, rule, mask, column) for rule, mask in faults]
    if data.time:
        times = split.times(table[data.time], data.missing)
        columns[split.TIME] = times
        no_time = times.map(lambda value: isinstance(value, str)).to_numpy(dtype=bool)
        for rule, mask in (("must be ISO 8601 or a number", no_time), (NOT_MISSING, times.isna().to_numpy())):
            if mask.any():
                found.append(_violation(data.time, rule, mask, table[data.time]))
    return pd.DataFrame(columns), found


def _readers(data: Data) -> dict[str, Cells]:
    readers = {}
    for name, column in data.columns.items():
        values = column.values if isinstance(column, Category) else None
        readers[name] = Cells(column, data.missing, values)
    if (label := data.label) is not None:
        may_miss = label.missing == "drop"
        if label.above is not None:
            readers[label.column] = Cells(Number(type="number", nullable=may_miss), data.missing)
        else:
            contract = Category(type="category", nullable=may_miss)
            readers[label.column] = Cells(contract, data.missing, label.classes)
    return readers


def _violation(name: str, rule: str, mask: np.ndarray, column: pa.ChunkedArray) -> Violation:
    rows = np.flatnonzero(mask)
    shown = rows[:NUM_EXAMPLES] if rule != NOT_MISSING else rows[:0]
    return Violation(name, rule, len(rows), [repr(column[row].as_py()) for row in shown.tolist()])


def violations(table: pa.Table, data: Data) -> pa.Table:
    """For `map_batches`: the violations of a block, a row each."""
    _, found = conform(table, data)
    columns: dict[str, list[Any]] = {"column": [], "rule": [], "count": [], "examples": []}
    for v in found:
        for key, values in columns.items():
            values.append(getattr(v, key))
    types = {
        "column": pa.string(),
        "rule": pa.string(),
        "count": pa.int64(),
        "examples": pa.list_(pa.string()),
    }
    return pa.table({key: pa.array(values, types[key]) for key, values in columns.items()})


def refuse(rows: list[dict[str, Any]], num_rows: int) -> None:
    """Raise UserError that lists the violations of all blocks, if there are any."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        key = (row["column"], row["rule"])
        counts[key] += row["count"]
        examples.setdefault(key, []).extend(row["examples"])
    if not counts:
        return
    lines = [
        f"{column}: {rule}: {counts[column, rule]:,} of {num_rows:,} rows"
        + (
            f", such as {', '.join(sorted(set(examples[column, rule]))[:NUM_EXAMPLES])}"
            if examples[column, rule]
            else ""
        )
        for column, rule in sorted(counts)
    ]
    said = "the data breaks its contract (data.columns); mend the data or the contract:"
    raise UserError(f"{said} {lines[0]}" if len(lines) == 1 else "\n  ".join([said, *lines]))
