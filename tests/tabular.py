"""A small tabular project, and its data prepared by hand, without Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from app.config import Project
from app.data import fitting
from app.data.prepare import LABEL, Prepared

PARTS = {"train": 130, "validation": 60}
"""Rows of each part."""
COLUMNS = ("a", "b", "c")


def project(**training: Any) -> Project:
    return Project.model_validate(
        {
            "name": "points",
            "data": {
                "source": {"path": "unused.parquet"},
                "label": {"column": "above", "positive": "yes"},
                "columns": {name: {"type": "number"} for name in COLUMNS},
            },
            "features": {name: {"encode": "min_max"} for name in COLUMNS},
            "model": {"kind": "mlp", "hidden": [8], "dropout": 0.2},
            "training": {
                "num_workers": 1,
                "epochs": 3,
                "batch_size": 16,
                "learning_rate": 0.05,
                "device": "cpu",
                **training,
            },
            "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
        }
    )


def rows(number: int, seed: int) -> pd.DataFrame:
    """Points of three numbers; the label is 1 if their sum plus some noise is above 0."""
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(random.normal(size=(number, len(COLUMNS))), columns=list(COLUMNS))
    noise = random.normal(scale=0.5, size=number)
    return frame.assign(**{LABEL: (frame.sum(axis=1) + noise > 0).astype(np.float32)})


def prepared(folder: Path, parts: dict[str, int] = PARTS) -> Prepared:
    """Create `folder` with the output of the prepare stage."""
    encodings = project().features
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {
        "data_version": "0" * 64,
        "rows": sum(parts.values()),
        "labels": ["no", "yes"],
        "parts": {},
    }
    for seed, (part, number) in enumerate(parts.items()):
        frame = rows(number, seed)
        (folder / part).mkdir()
        frame.to_parquet(folder / part / "rows.parquet")
        counts = [int((frame[LABEL] == label).sum()) for label in (0, 1)]
        summary["parts"][part] = {"rows": number, "counts": counts}
        if part == "train":
            fitted = fitting.fit([fitting.block_statistics(frame, encodings)], encodings)
            (folder / "preprocessor.json").write_text(fitted.model_dump_json())
    (folder / "summary.json").write_text(json.dumps(summary))
    return Prepared(folder, cached=True)
