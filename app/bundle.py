"""The bundle: the immutable directory that training makes and everything else consumes."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
from pydantic import BaseModel, ConfigDict

from app.config import Column, Project
from app.data.features import MISSING, Categories, Preprocessor
from app.errors import UserError

MANIFEST = "MANIFEST.json"
OUTPUT = "probability"
"""The graph's only output: the probability of the positive label, float32 (rows, 1)."""
NUM_EXAMPLES = 8


class Input(BaseModel):
    """A raw column that the model takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    contract: Column
    known: list[str] | None
    """Of a category: the values of the training part."""


class Schema(BaseModel):
    """What goes into the model and what comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """The registered model's."""
    inputs: list[Input]
    label: str
    positive: str


class BrokenBundle(UserError):
    """A bundle's files are not those of its manifest."""


class Bundle:
    """A verified bundle, open for predictions. Safe to use from several threads."""

    def __init__(self, path: Path, *, sealed: bool = True):
        """Verify and open. Raises BrokenBundle if any file was changed, added or removed.

        Not `sealed` is one that is being made, and has no manifest yet.
        """
        self.path = path
        self.manifest = verify(path) if sealed else {}
        self.schema = Schema.model_validate_json((path / "schema.json").read_text())
        self._session = session(path / "model.onnx")

    def predict(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probabilities of the positive label, float32 (rows,).

        `columns` has an array (rows,) for each of `schema.inputs`: numbers with NaN and strings with None
        for what is missing.
        """
        feed = inputs({i.name: np.asarray(columns[i.name]) for i in self.schema.inputs})
        return self._session.run([OUTPUT], feed)[0][:, 0]

    def check_example(self) -> None:
        """Predict the stored example again. Raises BrokenBundle if the answer is not the stored one."""
        example = json.loads((self.path / "example.json").read_text())
        got = self.predict(columns_of(self.schema, example["rows"]))
        worst = float(np.abs(got - example[OUTPUT]).max())
        if not worst <= 1e-4:
            raise BrokenBundle(f"{self.path}: answers its own example with a difference of {worst:.2g}")


def session(model: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread: replicas, not threads, are how serving scales."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inputs(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays (rows,) as the graph takes them: float64, or str with MISSING for None and NaN."""
    feed = {}
    for name, values in columns.items():
        if values.dtype.kind in "fiub":
            feed[name] = values.astype(np.float64)
        else:
            feed[name] = np.where(pd.isna(values), MISSING, values).astype(object)
    return feed


def schema_of(project: Project, preprocessor: Preprocessor) -> Schema:
    """What the bundle of a project takes and gives."""
    known = {
        c.column: [v for v in c.values if v != MISSING]
        for c in preprocessor.columns
        if isinstance(c, Categories)
    }
    return Schema(
        name=project.name,
        inputs=[
            Input(name=n, contract=project.data.columns[n], known=known.get(n)) for n in project.features
        ],
        label=project.data.label.column,
        positive=project.data.label.positive,
    )


def columns_of(schema: Schema, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows by column, as `Bundle.predict` takes them; None or an absent key is missing."""
    columns = {}
    for item in schema.inputs:
        values = [row.get(item.name) for row in rows]
        columns[item.name] = np.array(values, dtype=np.float64 if item.contract.type == "number" else object)
    return columns


def write_example(opened: Bundle, frame: pd.DataFrame) -> None:
    """Store a few rows with the bundle's answers: for `Bundle.check_example`, and for a first request."""
    head = frame[[i.name for i in opened.schema.inputs]].head(NUM_EXAMPLES).astype(object)
    rows = head.where(head.notna(), None).to_dict("records")
    answers = opened.predict(columns_of(opened.schema, rows)).tolist()
    (opened.path / "example.json").write_text(json.dumps({"rows": rows, OUTPUT: answers}, indent=1))


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, last: the SHA-256 of every file, and `facts` of how the bundle came about."""
    document = {
        **facts,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "files": {name: _sha256(folder / name) for name in _files(folder)},
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=1))


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all as they were written; raises BrokenBundle if not."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed = dict(manifest["files"])
    except FileNotFoundError:
        raise BrokenBundle(f"{path}: is no bundle: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenBundle(
            f"{path}: its {MANIFEST} cannot be read; take the bundle from the registry again"
        ) from None
    found = _files(path)
    faults = [f"{name} is missing" for name in listed if name not in found]
    faults += [f"{name} is not in the manifest" for name in found if name not in listed]
    faults += [
        f"{name} was changed" for name in found if name in listed and _sha256(path / name) != listed[name]
    ]
    if faults:
        raise BrokenBundle(f"{path}: {', '.join(sorted(faults))}; take the bundle from the registry again")
    return manifest


def _files(folder: Path) -> list[str]:
    return sorted(
        str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f != folder / MANIFEST
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_commit() -> str | None:
    """The commit of the code that runs, with `+` if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
