"""The contract: what every row of the source must keep, all violations found at once."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from app.config import Data, Label, Number, Text
from app.data import split
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

    Numbers become float64 and categories strings, with null for what is missing (NaN, empty strings and
    `data.missing`); the label becomes a string, or a number if it has a threshold; `split.TIME` is added
    if the split goes by it. With violations the frame is not to be used.
    """
    # Imported here: every Ray worker process imports this module, few of them check a block.
    from pandera.errors import SchemaErrors

    frame = _without_missing(table, data)
    try:
        return _pandera_schema(data).validate(frame, lazy=True), []
    except SchemaErrors as error:
        cases = error.failure_cases
        return frame, _violations(cases.assign(column=cases["column"].replace(split.TIME, data.time)))


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
        f"  {column}: {rule}: {counts[column, rule]:,} of {num_rows:,} rows"
        + (
            f", such as {', '.join(sorted(set(examples[column, rule]))[:NUM_EXAMPLES])}"
            if examples[column, rule]
            else ""
        )
        for column, rule in sorted(counts)
    ]
    raise UserError(
        "the data breaks its contract (data.columns); mend the data or the contract:\n" + "\n".join(lines)
    )


def _without_missing(table: pa.Table, data: Data) -> pd.DataFrame:
    """The block in pandas, decoded, with None for what is missing."""
    columns: dict[str, pd.Series] = {}
    label = data.label
    for name in [*data.columns, *([label.column] if label else [])]:
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if label and name == label.column and label.above is None:
            # An integer or boolean label is compared with `positive` as text.
            column = column.cast(pa.string())
        elif pa.types.is_null(column.type):
            is_string = name in data.columns and data.columns[name].type != "number"
            column = column.cast(pa.string() if is_string else pa.float64())
        elif pa.types.is_decimal(column.type) or pa.types.is_boolean(column.type):
            column = column.cast(pa.float64()) if pa.types.is_decimal(column.type) else column.cast(pa.int8())
        series = column.to_pandas()
        if any(
            is_(column.type)
            for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            series = series.astype(object).where(~series.isin(["", *data.missing]) & series.notna(), None)
        columns[name] = series
    if data.time:
        columns[split.TIME] = split.times(table[data.time])
    return pd.DataFrame(columns)


def _pandera_schema(data: Data) -> Any:
    from pandera import pandas as pandera

    columns: dict[str, pandera.Column] = {}
    for name, column in data.columns.items():
        checks = []
        if isinstance(column, Number):
            checks.append(pandera.Check(np.isfinite, error="must be finite"))
            if column.min is not None:
                checks.append(pandera.Check.ge(column.min, error=f"must be at least {column.min:g}"))
            if column.max is not None:
                checks.append(pandera.Check.le(column.max, error=f"must be at most {column.max:g}"))
            columns[name] = pandera.Column(float, checks, nullable=column.nullable, coerce=True)
        else:
            if isinstance(column, Text):
                limit = column.max_characters
                checks.append(
                    pandera.Check.str_length(max_value=limit, error=f"must have at most {limit} characters")
                )
            elif column.values is not None:
                checks.append(
                    pandera.Check.isin(column.values, error=f"must be one of {', '.join(column.values)}")
                )
            columns[name] = pandera.Column(object, checks, nullable=column.nullable)
    if data.label:
        columns[data.label.column] = _label(data.label)
    if data.time:
        is_time = pandera.Check(
            lambda value: not isinstance(value, str), element_wise=True, error="must be ISO 8601 or a number"
        )
        columns[split.TIME] = pandera.Column(object, is_time, nullable=False)
    return pandera.DataFrameSchema(columns)


def _label(label: Label) -> Any:
    from pandera import pandas as pandera

    may_miss = label.missing == "drop"
    if label.above is not None:
        finite = pandera.Check(np.isfinite, error="must be finite")
        return pandera.Column(float, finite, nullable=may_miss, coerce=True)
    names = label.classes
    known = pandera.Check.isin(names, error=f"must be one of {', '.join(names)}") if names else None
    return pandera.Column(object, known, nullable=may_miss)


def _violations(cases: pd.DataFrame) -> list[Violation]:
    """Pandera's failure cases (a row each), gathered by column and rule."""
    found: dict[tuple[str, str], Violation] = {}
    no_number = set(cases.loc[cases["check"].str.startswith("coerce_dtype"), "column"])
    for case in cases.itertuples():
        if case.check == "not_nullable":
            rule = "must not be missing"
        elif case.check.startswith("coerce_dtype"):
            rule = "must be a number"
        elif case.column in no_number:
            continue  # what else pandera says of text is noise
        else:
            rule = case.check
        violation = found.setdefault((case.column, rule), Violation(case.column, rule))
        violation.count += 1
        if rule != "must not be missing" and len(violation.examples) < NUM_EXAMPLES:
            violation.examples.append(repr(case.failure_case))
    return list(found.values())
