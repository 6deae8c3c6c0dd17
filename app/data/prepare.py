"""The first stage: from the raw source to three checked parts and a fitted preprocessor."""

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
from app.data import contract, features, interactions, split, tokens
from app.data.features import Preprocessor
from app.data.sources import files
from app.errors import UserError, unwrap_user_errors
from app.state import stages

LABEL = "__label__"
"""The column of a prepared part that holds the label: 0 or 1, or its place among `label.classes`."""
MAX_LABELS = 100
"""A label with more values does not have them listed."""


@dataclass(frozen=True)
class Prepared:
    """The output of the stage."""

    path: Path
    cached: bool
    """Whether it had been made before."""

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor.model_validate_json((self.path / "preprocessor.json").read_text())

    @property
    def summary(self) -> dict[str, Any]:
        """The data version, the label's values if they are few, and for each part `rows` and `counts`: rows
        with each label, in the order of LABEL (of a recommender `users`)."""
        return json.loads((self.path / "summary.json").read_text())

    def balanced_weights(self) -> np.ndarray:
        """The weight of a training row by its label, float32 (labels,): all labels together weigh the same,
        and a row weighs 1 on average."""
        counts = np.array(self.summary["parts"]["train"]["counts"], dtype=np.float64)
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)

    def part(self, name: str) -> Path:
        """The folder of Parquet files with one part's rows: the contract's columns and LABEL."""
        return self.path / name

    def frame(self, name: str, rows: np.ndarray | None = None) -> pd.DataFrame:
        """One part in memory, in its fixed order; of its rows those where the mask `rows` is true."""
        frame = pd.read_parquet(self.part(name))
        return frame if rows is None else frame[rows].reset_index(drop=True)


def prepare(project: Project, *, fresh: bool = False) -> Prepared:
    """Read, check, split and fit, unless it has been done. Needs Ray.

    Raises UserError for a source or values that break the contract, and for a label that cannot be learnt.
    """
    version = files.version(project.data.source)
    target = stages.folder("prepare", key(project, version))
    with unwrap_user_errors():
        built = stages.produce(target, lambda draft: _build(project, version, draft), fresh=fresh)
    return Prepared(stages.current(target), cached=not built)


def key(project: Project, data_version: str) -> str:
    """The name under which a project's prepared data are kept."""
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
    raw = files.read(data).materialize()
    num_rows = raw.count()
    whole = {"batch_format": "pyarrow", "batch_size": None}
    contract.refuse(raw.map_batches(contract.violations, fn_args=(data,), **whole).take_all(), num_rows)

    if data.interactions:
        interactions.build(raw, data, version, draft)
        return
    starts = None
    if data.split.by == "time":
        found = raw.map_batches(_count_times, fn_args=(data,), **whole).to_pandas()
        starts = split.starts(found["time"].to_numpy(), found["rows"].to_numpy(), data.split)
    (draft / split.PARTITION).write_text(split.partition(data, starts).model_dump_json(indent=1))
    rows = raw.map_batches(_label_and_part, fn_args=(project, starts), **whole).materialize()
    labels: Counter[str] = Counter()
    for count in rows.map_batches(_count_labels, fn_args=(data.target.column,), **whole).take_all():
        labels[count["value"]] += count["rows"]
    _refuse_labels(labels, data.target)

    parts = {}
    for i, name in enumerate(split.PARTS):
        parts[name] = rows.map_batches(_select, fn_args=(i, _dropped(name, data)), **whole).materialize()
        parts[name].write_parquet(str(draft / name))
    statistics = parts["train"].map_batches(_statistics, fn_args=(project.features,), **whole).take_all()
    preprocessor = features.fit([json.loads(row["statistics"]) for row in statistics], project.features)
    (draft / "preprocessor.json").write_text(preprocessor.model_dump_json(indent=1))
    if encoder := project.model.tokenizer:
        (encoding,) = (e for e in project.features.values() if isinstance(e, Tokens))
        tokens.write(encoder, encoding.max_length, draft / tokens.FILE)

    summary: dict[str, Any] = {
        "data_version": version,
        "rows": labels.total(),
        "labels": sorted(labels) if len(labels) <= MAX_LABELS else [],
        "parts": {},
    }
    for name, part in parts.items():
        counts = _counts(part.map_batches(_count_labels, fn_args=(LABEL,), **whole).take_all(), data.target)
        if not all(counts):
            raise UserError(
                f"data.split: the {name} part has {part.count()} rows, and not every label among them; "
                f"{num_rows} rows in all are too few for these shares"
            )
        summary["parts"][name] = {"rows": part.count(), "counts": counts}
    (draft / "summary.json").write_text(json.dumps(summary, indent=1))


def _labelled(block: pa.Table, data: config.Data) -> pd.DataFrame:
    frame, _ = contract.conform(block, data)
    return frame[frame[data.target.column].notna()]


def _count_times(block: pa.Table, data: config.Data) -> pa.Table:
    times = _labelled(block, data)[split.TIME].to_numpy(np.float64)
    values, counts = np.unique(times, return_counts=True)
    return pa.table({"time": values, "rows": counts})


def _label_and_part(block: pa.Table, project: Project, starts: tuple[float, ...] | None = None) -> pa.Table:
    frame = _labelled(block, project.data)
    label = project.data.target
    part = split.assign(frame, project.data.split, project.data.split_key, starts)
    if label.above is not None:
        beyond = frame[label.column] > label.above
        frame[label.column] = np.where(beyond, label.outcome, f"not {label.outcome}")
    if label.classes is None:
        frame[LABEL] = (frame[label.column] == label.outcome).astype(np.float32)
    else:
        frame[LABEL] = pd.Index(label.classes).get_indexer(frame[label.column])
    frame["__part__"] = part.astype(np.int8)
    types = [
        (n, pa.float64() if c.type == "number" else pa.string()) for n, c in project.data.columns.items()
    ]
    arrow = pa.schema(
        [
            *types,
            (label.column, pa.string()),
            (LABEL, pa.int64() if label.classes else pa.float32()),
            ("__part__", pa.int8()),
            *([(split.TIME, pa.float64())] if project.data.time else []),
        ]
    )
    return pa.Table.from_pandas(frame, schema=arrow, preserve_index=False)


def _count_labels(block: pa.Table, column: str) -> pa.Table:
    counts = block[column].value_counts()
    return pa.table({"value": counts.field("values"), "rows": counts.field("counts")})


def _refuse_labels(counts: Counter[str], label: config.Label) -> None:
    found = ", ".join(f"{value!r} ({count:,} rows)" for value, count in counts.most_common(8))
    if len(counts) < 2:
        raise UserError(
            f"data.label: {label.column!r} must have two values or more, but it is constant: {found}"
        )
    key = "positive" if label.classes is None else "classes"
    for value in label.classes or [label.outcome]:
        if value not in counts:
            raise UserError(f"data.label.{key}: {value!r} does not occur in {label.column!r}; it has {found}")


def _counts(blocks: list[dict[str, Any]], label: config.Label) -> list[int]:
    """The rows with each label, in order; with a binary one, those of 0 and 1."""
    rows: Counter[int] = Counter()
    for block in blocks:
        rows[int(block["value"])] += block["rows"]
    return [rows[i] for i in range(len(label.classes or "01"))]


def _dropped(part: str, data: config.Data) -> list[str]:
    """Columns that a part does not keep. The test part keeps the time: a champion's split may go by it."""
    times = [split.TIME] if data.time and part != "test" else []
    return ["__part__", data.target.column, *times]


def _select(block: pa.Table, part: int, dropped: list[str]) -> pa.Table:
    return block.filter(pa.compute.equal(block["__part__"], part)).drop_columns(dropped)


def _statistics(block: pa.Table, wanted: dict[str, config.Encoding]) -> pa.Table:
    return pa.table({"statistics": [json.dumps(features.block_statistics(block.to_pandas(), wanted))]})
