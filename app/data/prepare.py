"""The first stage: from the raw source to three checked parts and a fitted preprocessor."""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from app import store
from app.config import Project
from app.config import data as config
from app.data import features, schema, sources, split
from app.data.features import Preprocessor
from app.errors import UserError

CODE = (config, features, schema, sources, split, sys.modules[__name__])
LABEL = "__label__"
"""The column of a prepared part that holds the label as 0 or 1."""


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
        """Rows and share of positives by part, and the data version."""
        return json.loads((self.path / "summary.json").read_text())

    def part(self, name: str) -> Path:
        """The folder of Parquet files with one part's rows: the contract's columns and LABEL."""
        return self.path / name

    def frame(self, name: str) -> pd.DataFrame:
        """One part in memory, in its fixed order."""
        return pd.read_parquet(self.part(name))


def prepare(project: Project, *, fresh: bool = False) -> Prepared:
    """Read, check, split and fit, unless it has been done. Needs Ray.

    Raises UserError for a source or values that break the contract, and for a label that cannot be learnt.
    """
    version = sources.version(project.data.source)
    inputs = {
        "data_version": version,
        "data": project.data.model_dump(exclude={"source": {"path", "sample"}}),
        "features": project.model_dump()["features"],
        "seed": project.seed,
    }
    key = store.key("prepare", inputs, CODE)
    target = store.folder("prepare", key)
    built = store.produce(target, lambda draft: _build(project, version, draft), fresh=fresh)
    return Prepared(target, cached=not built)


def _build(project: Project, version: str, draft: Path) -> None:
    import ray.data

    # The order of rows decides the order of batches: without this it varies from run to run.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    data = project.data
    raw = sources.read(data).materialize()
    num_rows = raw.count()
    whole = {"batch_format": "pyarrow", "batch_size": None}
    schema.refuse(raw.map_batches(schema.violations, fn_args=(data,), **whole).take_all(), num_rows)

    rows = raw.map_batches(_label_and_part, fn_args=(project,), **whole).materialize()
    labels: Counter[str] = Counter()
    for count in rows.map_batches(_count_labels, fn_args=(data.label.column,), **whole).take_all():
        labels[count["value"]] += count["rows"]
    _refuse_labels(labels, data.label)

    parts = {}
    for i, name in enumerate(split.PARTS):
        parts[name] = rows.map_batches(_select, fn_args=(i, data.label.column), **whole).materialize()
        parts[name].write_parquet(str(draft / name))
    statistics = parts["train"].map_batches(_statistics, fn_args=(project.features,), **whole).take_all()
    preprocessor = features.fit([json.loads(row["statistics"]) for row in statistics], project.features)
    (draft / "preprocessor.json").write_text(preprocessor.model_dump_json(indent=1))

    summary = {"data_version": version, "rows": num_rows, "parts": {}}
    for name, part in parts.items():
        positive = part.mean(LABEL)
        if positive is None or not 0 < positive < 1:
            raise UserError(
                f"data.split: the {name} part has {part.count()} rows with a label that is always the same; "
                f"{num_rows} rows in all are too few for these shares"
            )
        summary["parts"][name] = {"rows": part.count(), "positive": round(positive, 4)}
    (draft / "summary.json").write_text(json.dumps(summary, indent=1))


def _label_and_part(block: pa.Table, project: Project) -> pa.Table:
    frame, _ = schema.conform(block, project.data)
    label = project.data.label
    part = split.assign(frame, project.data.split, project.seed)
    frame[LABEL] = (frame[label.column] == label.positive).astype(np.float32)
    frame["__part__"] = part.astype(np.int8)
    types = [
        (n, pa.float64() if c.type == "number" else pa.string()) for n, c in project.data.columns.items()
    ]
    arrow = pa.schema([*types, (label.column, pa.string()), (LABEL, pa.float32()), ("__part__", pa.int8())])
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
    if label.positive not in counts:
        raise UserError(
            f"data.label.positive: {label.positive!r} does not occur in {label.column!r}; it has {found}"
        )


def _select(block: pa.Table, part: int, label: str) -> pa.Table:
    return block.filter(pa.compute.equal(block["__part__"], part)).drop_columns(["__part__", label])


def _statistics(block: pa.Table, wanted: dict[str, config.Encoding]) -> pa.Table:
    return pa.table({"statistics": [json.dumps(features.block_statistics(block.to_pandas(), wanted))]})
