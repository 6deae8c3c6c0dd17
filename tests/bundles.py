"""A small real bundle: a hand-made preprocessor and an untrained network, exported and sealed."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from app.bundle import bundle
from app.bundle.manifest import seal
from app.bundle.schema import Schema, label_schema
from app.config import Project
from app.data.features import Categories, Preprocessor, ScaledNumber
from app.tasks.tabular import graph
from app.tasks.tabular.network import MultiLayerPerceptron

PASSED = {"passed": True, "reason": "made by hand"}
EDUCATION = ["Bachelors", "Doctorate", "HS-grad"]

PROJECT: dict[str, Any] = {
    "name": "income",
    "data": {
        "source": {"path": "unused.parquet"},
        "label": {"column": "income", "positive": ">50K"},
        "columns": {
            "age": {"type": "number", "min": 0, "max": 120},
            "hours-per-week": {"type": "number", "nullable": True},
            "education": {"type": "category"},
            "workclass": {"type": "category", "nullable": True, "unseen": "ignore"},
            "gender": {"type": "category", "values": ["Female", "Male"]},
        },
    },
    "features": {
        "age": {"encode": "min_max"},
        "hours-per-week": {"encode": "min_max"},
        "education": {"encode": "one_hot"},
        "workclass": {"encode": "embedding", "width": 2},
        "gender": {"encode": "one_hot"},
    },
    "model": {"kind": "mlp", "hidden": [8]},
    "training": {"num_workers": 1, "epochs": 1, "batch_size": 8, "learning_rate": 0.1},
    "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
}

ROWS: list[dict[str, Any]] = [
    {"age": 39, "hours-per-week": 40, "education": "Bachelors", "workclass": "Private", "gender": "Male"},
    {"age": 52.5, "hours-per-week": None, "education": "HS-grad", "workclass": None, "gender": "Female"},
    {"age": 0, "hours-per-week": -3, "education": "Doctorate", "workclass": "State-gov", "gender": "Female"},
]


def preprocessor(education: list[str]) -> Preprocessor:
    return Preprocessor(
        columns=[
            ScaledNumber(column="age", minimum=0, maximum=90, fill=0.4),
            ScaledNumber(column="hours-per-week", minimum=1, maximum=99, fill=0.4),
            Categories(column="education", encode="one_hot", values=education, width=len(education)),
            Categories(column="gender", encode="one_hot", values=["Female", "Male"], width=2),
            Categories(column="workclass", encode="embedding", values=["", "Private", "State-gov"], width=2),
        ]
    )


def schema(education: list[str] = EDUCATION) -> Schema:
    """The schema of the bundle; `education` are the values of that column that training saw."""
    return label_schema(Project.model_validate(PROJECT), preprocessor(education))


def build(folder: Path, seed: int) -> Path:
    """Create a sealed bundle in `folder`; each seed gives another model."""
    folder.mkdir()
    for name, content in _files(seed).items():
        (folder / name).write_bytes(content)
    return folder


@functools.cache
def _files(seed: int) -> dict[str, bytes]:
    """The bundle's files by name. An export takes a second, so each process makes one for each seed."""
    fitted = preprocessor(EDUCATION)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MultiLayerPerceptron(fitted.layout, [8], dropout=0.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        graph.export(model, fitted, folder / "model.onnx")
        (folder / "schema.json").write_text(schema().model_dump_json())
        bundle.write_example(bundle.Bundle(folder, sealed=False), pd.DataFrame(ROWS))
        pd.DataFrame(ROWS).to_parquet(folder / "reference.parquet", index=False)
        seal(folder, {"seed": seed, "data_version": "c0ffee", "decision": PASSED})
        return {path.name: path.read_bytes() for path in folder.iterdir()}
