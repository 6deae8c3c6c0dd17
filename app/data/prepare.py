"""The prepare stage: it makes three checked parts and a fitted preprocessor from a source."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from app.config import Project, Tokens
from app.config import data as config
from app.data import contract, fitting, interactions, split, tokens
from app.data.features import Preprocessor
from app.data.partition import PARTITION_FILE, partition_of
from app.data.sources import files
from app.errors import UserError, unwrap_user_errors
from app.state import stages

LABEL = "__label__"
"""Column of a prepared part with the label: 0 or 1, or its index in `label.classes`."""
PART = "__part__"
"""Column with the index of the row's part in `split.PARTS`, int8, while the parts are divided."""
MAX_LISTED_LABELS = 100
"""Maximum number of label values that the summary lists."""
WHOLE_BLOCKS = {"batch_format": "pyarrow", "batch_size": None}
"""Options of `map_batches` for one Arrow table per block."""


@dataclass(frozen=True)
class Prepared:
    """Output of the prepare stage."""

    path: Path
    cached: bool
    """Whether an earlier run made the data."""

    @property
    def key(self) -> str:
        """Stage key of the prepared data."""
        return self.path.name

    @property
    def preprocessor(self) -> Preprocessor:
        """Preprocessor that was fitted on the training part; a recommender has none."""
        return Preprocessor.model_validate_json((self.path / "preprocessor.json").read_text())

    @property
    def summary(self) -> dict[str, Any]:
        """Data version, label values if they are few, and for each part `rows` and `counts`: the number of
        rows with each label, in the order of LABEL (for a recommender `users` instead)."""
        return json.loads((self.path / "summary.json").read_text())

    def balanced_weights(self) -> np.ndarray:
        """The weight of a training row by its label, float32 (labels,). All labels have the same total
        weight, and the mean weight of a row is 1."""
        counts = np.array(self.summary["parts"]["train"]["counts"], dtype=np.float64)
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)

    def part(self, name: str) -> Path:
        """The folder of Parquet files with one part's rows: the contract's columns and LABEL."""
        return self.path / name

    def frame(self, name: str, rows: np.ndarray | None = None) -> pd.DataFrame:
        """One part in memory, in its fixed order; only the rows of the mask `rows`, if there is one."""
        frame = pd.read_parquet(self.part(name))
        return frame if rows is None else frame[rows].reset_index(drop=True)


def prepare(project: Project, *, fresh: bool = False) -> Prepared:
    """Read, check, split and fit, unless an earlier run did. Needs Ray.

    Raises UserError if the source or its values break the contract, or if the label cannot be learned.
    """
    version = files.version(project.data.source)
    target = stages.folder("prepare", key(project, version))
    with unwrap_user_errors():
        built = stages.produce(target, lambda draft: _build(project, version, draft), fresh=fresh)
    return Prepared(stages.current(target), cached=not built)


def key(project: Project, data_version: str) -> str:
    """The stage key of a project's prepared data."""
    inputs = {
        "data_version": data_version,
        "data": project.data.model_dump(exclude={"source": {"path", "sample"}}),
        "features": project.model_dump()["features"],
    }
    if encoder := project.model.tokenizer:
        inputs["encoder"] = tokens.version(encoder)
    return stages.key("prepare", inputs, __name__)


def _build(project: Project, version: str, draft: Path) -> None:
    data = project.data
    source = files.read(data).materialize()
    num_rows = source.count()
    violations = source.map_batches(contract.violation_table, fn_args=(data,), **WHOLE_BLOCKS).take_all()
    contract.require_no_violations(violations, num_rows)

    if data.interactions:
        interactions.build(source, data, version, draft)
        return
    starts = None
    if data.split.by == "time":
        times = source.map_batches(_count_times, fn_args=(data,), **WHOLE_BLOCKS).to_pandas()
        starts = split.part_starts(times["time"].to_numpy(), times["rows"].to_numpy(), data.split)
    (draft / PARTITION_FILE).write_text(partition_of(data, starts).model_dump_json(indent=1))
    rows = source.map_batches(_label_and_part, fn_args=(project, starts), **WHOLE_BLOCKS).materialize()
    labels: Counter[str] = Counter()
    for count in rows.map_batches(_count_labels, fn_args=(data.target.column,), **WHOLE_BLOCKS).take_all():
        labels[count["value"]] += count["rows"]
    _require_learnable(labels, data.target)

    parts = {}
    for i, name in enumerate(split.PARTS):
        dropped = _dropped_columns(name, data)
        parts[name] = rows.map_batches(_select, fn_args=(i, dropped), **WHOLE_BLOCKS).materialize()
        parts[name].write_parquet(str(draft / name))
    statistics = parts["train"].map_batches(_statistics, fn_args=(project.features,), **WHOLE_BLOCKS)
    blocks = [json.loads(row["statistics"]) for row in statistics.take_all()]
    preprocessor = fitting.fit(blocks, project.features)
    (draft / "preprocessor.json").write_text(preprocessor.model_dump_json(indent=1))
    if encoder := project.model.tokenizer:
        (encoding,) = (e for e in project.features.values() if isinstance(e, Tokens))
        tokens.write(encoder, encoding.max_length, draft / tokens.TOKENIZER_FILE)

    summary: dict[str, Any] = {
        "data_version": version,
        "rows": labels.total(),
        "labels": sorted(labels) if len(labels) <= MAX_LISTED_LABELS else [],
        "parts": {},
    }
    for name, part in parts.items():
        label_rows = part.map_batches(_count_labels, fn_args=(LABEL,), **WHOLE_BLOCKS).take_all()
        counts = _label_counts(label_rows, data.target)
        if not all(counts):
            raise UserError(
                f"data.split: every part must have rows of every label, but the {name} part has "
                f"{part.count()} rows and lacks some: {num_rows} rows in all are too few for these shares; "
                "use more rows or larger shares"
            )
        summary["parts"][name] = {"rows": part.count(), "counts": counts}
    (draft / "summary.json").write_text(json.dumps(summary, indent=1))


# The functions below process one block.


def _labelled(block: pa.Table, data: config.Data) -> pd.DataFrame:
    """The conformed rows that have a label."""
    frame, _ = contract.conform(block, data)
    return frame[frame[data.target.column].notna()]


def _count_times(block: pa.Table, data: config.Data) -> pa.Table:
    """The number of labelled `rows` at each `time`."""
    times = _labelled(block, data)[split.TIME].to_numpy(np.float64)
    values, counts = np.unique(times, return_counts=True)
    return pa.table({"time": values, "rows": counts})


def _label_and_part(block: pa.Table, project: Project, starts: tuple[float, ...] | None = None) -> pa.Table:
    """The labelled rows with LABEL, PART and, if the split is by time, `split.TIME`."""
    frame = _labelled(block, project.data)
    label = project.data.target
    part = split.assign_parts(frame, project.data.split, project.data.split_key, starts)
    if label.above is not None:
        is_above = frame[label.column] > label.above
        frame[label.column] = np.where(is_above, label.outcome, f"not {label.outcome}")
    if label.classes is None:
        frame[LABEL] = (frame[label.column] == label.outcome).astype(np.float32)
    else:
        frame[LABEL] = pd.Index(label.classes).get_indexer(frame[label.column])
    frame[PART] = part.astype(np.int8)
    types = [
        (name, pa.float64() if column.type == "number" else pa.string())
        for name, column in project.data.columns.items()
    ]
    schema = pa.schema(
        [
            *types,
            (label.column, pa.string()),
            (LABEL, pa.int64() if label.classes else pa.float32()),
            (PART, pa.int8()),
            *([(split.TIME, pa.float64())] if project.data.time else []),
        ]
    )
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False)


def _count_labels(block: pa.Table, column: str) -> pa.Table:
    """The number of `rows` with each `value` of a column."""
    counts = block[column].value_counts()
    return pa.table({"value": counts.field("values"), "rows": counts.field("counts")})


def _select(block: pa.Table, part: int, dropped: list[str]) -> pa.Table:
    """One part's rows, without the dropped columns."""
    return block.filter(pa.compute.equal(block[PART], part)).drop_columns(dropped)


def _statistics(block: pa.Table, encodings: dict[str, config.Encoding]) -> pa.Table:
    """The statistics that the preprocessor is fitted on, as one row of JSON."""
    return pa.table({"statistics": [json.dumps(fitting.block_statistics(block.to_pandas(), encodings))]})


# The functions below combine the blocks.


def _require_learnable(counts: Counter[str], label: config.Label) -> None:
    """Raises UserError if the label is constant, or if a configured value does not occur."""
    values = ", ".join(f"{value!r} ({count:,} rows)" for value, count in counts.most_common(8))
    if len(counts) < 2:
        raise UserError(
            f"data.label: {label.column!r} must have two values or more, but it is constant: {values}"
        )
    setting = "positive" if label.classes is None else "classes"
    for value in label.classes or [label.outcome]:
        if value not in counts:
            raise UserError(
                f"data.label.{setting}: {value!r} must occur in {label.column!r}, which has {values}"
            )


def _label_counts(blocks: list[dict[str, Any]], label: config.Label) -> list[int]:
    """The number of rows with each label, in the order of LABEL."""
    rows: Counter[int] = Counter()
    for block in blocks:
        rows[int(block["value"])] += block["rows"]
    return [rows[i] for i in range(len(label.classes or "01"))]


def _dropped_columns(part: str, data: config.Data) -> list[str]:
    """The columns that a part does not keep. The test part keeps the time, because a champion's split may be
    by time."""
    times = [split.TIME] if data.time and part != "test" else []
    return [PART, data.target.column, *times]
