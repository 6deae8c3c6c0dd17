"""The bundle: the immutable directory that training makes and everything else consumes."""

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from app.bundle.signature import SIGNATURE
from app.config import Category, Column, Project
from app.data import tokens
from app.data.cells import Cells
from app.data.features import MISSING, Categories, Preprocessor
from app.errors import UserError
from app.state import files

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

MANIFEST = "MANIFEST.json"
KINDS = {".json", ".md", ".onnx", ".parquet", ".safetensors", ".txt"}
"""Endings of files that a bundle may have. None of them is run by whoever opens it."""
AGAIN = "remove the folder and give the command again: a registered bundle is then fetched anew"
"""What to do about a broken bundle."""
REQUIRED = ("example.json", "model.onnx", "schema.json")
FLAVOR = "MLmodel"
"""For MLflow's own tools."""
OUTPUT = "probability"
"""The graph's only output, float32: the probability of the positive label (rows, 1), or of each class
(rows, classes)."""
ITEMS, SCORES, KNOWN = "items", "scores", "known"
"""A recommender's outputs: strings and float32 (rows, n), and bool (rows,)."""
MAX_ITEMS = 100
"""Items of a recommender's answer."""
NUM_EXAMPLES = 8
TEXTS_AT_ONCE = 32


class Input(BaseModel):
    """A raw column that the model takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    contract: Column
    known: list[str] | None
    """Of a category: the values of the training part."""

    @property
    def allowed(self) -> list[str] | None:
        """The values that a row to be predicted may have; None if any."""
        if not isinstance(self.contract, Category):
            return None
        return self.known or [] if self.contract.unseen == "refuse" else self.contract.values


class Schema(BaseModel):
    """What goes into the model and what comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """The registered model's."""
    task: Literal["binary", "classes", "ranking"] = "binary"
    inputs: list[Input]
    missing: list[str] = []
    """Strings that stand for a missing value, beside null and the empty string."""
    label: str
    """The column that is predicted; of a ranking, the items'."""
    positive: str = ""
    """Of a binary task: what counts as 1."""
    negatives: list[str] = []
    """Of a binary task: the label's other values in training; empty if there are many."""
    above: float | None = None
    """Of a binary task with a threshold: the number beyond which a value counts as 1."""
    classes: list[str] = []
    """Of several classes: their names, in the order of the graph's output."""
    num_items: int = 0
    """Of a ranking: how many items the graph gives."""

    def cells(self) -> dict[str, Cells]:
        """The reader of each input's cells."""
        return {i.name: Cells(i.contract, self.missing, i.allowed) for i in self.inputs}


@dataclass(frozen=True)
class Ranking:
    """The best items for some users, best first, without those that they have had."""

    items: np.ndarray
    """str (rows, n); empty strings at the end where fewer are left."""
    scores: np.ndarray
    """float32 (rows, n): comparable within a row alone."""
    known: np.ndarray
    """bool (rows,): whether training saw the user; who is not known gets the most popular items."""


class BrokenBundle(UserError):
    """A bundle's files are not as its manifest says."""


class Bundle:
    """A verified bundle, open for predictions. Safe to use from several threads."""

    def __init__(self, path: Path, *, sealed: bool = True):
        """Verify and open. Raises BrokenBundle if a file of the manifest was changed or removed.

        Not `sealed` is one that is being made, and has no manifest yet.
        """
        self.path = path
        self.manifest = verify(path) if sealed else {}
        self.schema = schema_at(path)
        self._session = session(path / "model.onnx")
        # Only what was verified is opened: others may put files of this name into the folder.
        has_tokenizer = tokens.FILE in self.manifest["files"] if sealed else (path / tokens.FILE).exists()
        self._tokenizer = tokens.load(path / tokens.FILE) if has_tokenizer else None

    def predict(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probabilities, float32: of the positive label (rows,), or of each class (rows, classes).

        `columns` has an array (rows,) for each of `schema.inputs`: numbers with NaN and strings with None
        for what is missing.
        """
        arrays = {i.name: np.asarray(columns[i.name]) for i in self.schema.inputs}
        if self._tokenizer is None:
            given = self._session.run([OUTPUT], inputs(arrays))[0]
        else:
            (texts,) = arrays.values()
            given = self._of_texts(self._tokenizer, texts)
        return given[:, 0] if self.schema.task == "binary" else given

    def rank(self, columns: Mapping[str, np.ndarray]) -> Ranking:
        """A recommender's answer for each user; `columns` as of `predict`."""
        arrays = {i.name: np.asarray(columns[i.name]) for i in self.schema.inputs}
        return Ranking(*self._session.run([ITEMS, SCORES, KNOWN], inputs(arrays)))

    def _of_texts(self, tokenizer: "Tokenizer", texts: np.ndarray) -> np.ndarray:
        """In batches of texts of like length: padding is computed like text."""
        ids, lengths = tokens.encode(tokenizer, texts)
        given = np.empty((len(texts), len(self.schema.classes)), dtype=np.float32)
        order = np.argsort(lengths, kind="stable")
        for rows in np.array_split(order, max(1, math.ceil(len(order) / TEXTS_AT_ONCE))):
            feed = tokens.pad(ids[rows], lengths[rows])
            given[rows] = self._session.run([OUTPUT], feed)[0]
        return given

    def check_example(self) -> None:
        """Predict the stored example again. Raises BrokenBundle if the answer is not the stored one."""
        example = json.loads((self.path / "example.json").read_text())
        columns = columns_of(self.schema, example["rows"])
        if self.schema.task == "ranking":
            scores, stored = self.rank(columns).scores, np.array(example[SCORES])
            worst = float((np.abs(scores - stored) / np.maximum(1, np.abs(stored))).max())
        else:
            worst = float(np.abs(self.predict(columns) - example[OUTPUT]).max())
        if not worst <= 1e-4:
            raise BrokenBundle(f"{self.path}: answers its own example with a difference of {worst:.2g}")


def schema_at(path: Path) -> Schema:
    """What the bundle in a folder takes and gives."""
    schema = Schema.model_validate_json((path / "schema.json").read_text())
    project = path / "project.json"
    if "missing" not in schema.model_fields_set and project.exists():
        # Older bundles have the markers in their project alone.
        missing = json.loads(project.read_text())["data"]["missing"]
        schema = schema.model_copy(update={"missing": missing})
    return schema


def session(model: Path) -> "onnxruntime.InferenceSession":
    """ONNX Runtime on one thread: replicas, not threads, are how serving scales."""
    # Imported here: a training rank imports this module, and never runs a graph.
    import onnxruntime

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
            # For the few rows of a request, faster than pandas' isna.
            feed[name] = np.array([MISSING if _is_missing(v) else v for v in values.tolist()], dtype=object)
    return feed


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value != value


def schema_of(project: Project, preprocessor: Preprocessor, labels: Sequence[str] = ()) -> Schema:
    """What the bundle of a project takes and gives; `labels` are the label's values in training."""
    known = {
        c.column: [v for v in c.values if v != MISSING]
        for c in preprocessor.columns
        if isinstance(c, Categories)
    }
    label = project.data.target
    return Schema(
        name=project.name,
        task="binary" if label.classes is None else "classes",
        inputs=[
            Input(name=n, contract=project.data.columns[n], known=known.get(n)) for n in project.features
        ],
        missing=project.data.missing,
        label=label.column,
        positive=label.outcome if label.classes is None else "",
        negatives=[value for value in labels if value != label.outcome] if label.classes is None else [],
        above=label.above,
        classes=label.classes or [],
    )


def columns_of(schema: Schema, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows that were read before, by column, as `Bundle.predict` takes them.

    None or an absent key is missing.
    """
    columns = {}
    for item in schema.inputs:
        values = [row.get(item.name) for row in rows]
        columns[item.name] = np.array(values, dtype=np.float64 if item.contract.type == "number" else object)
    return columns


def write_example(opened: Bundle, frame: pd.DataFrame) -> None:
    """Store a few rows with the bundle's answers: for `Bundle.check_example`, and for a first request."""
    head = frame[[i.name for i in opened.schema.inputs]].head(NUM_EXAMPLES).astype(object)
    rows = head.where(head.notna(), None).to_dict("records")
    columns = columns_of(opened.schema, rows)
    if opened.schema.task == "ranking":
        ranking = opened.rank(columns)
        answers = {ITEMS: ranking.items.tolist(), SCORES: ranking.scores.tolist()}
    else:
        answers = {OUTPUT: opened.predict(columns).tolist()}
    (opened.path / "example.json").write_text(json.dumps({"rows": rows, **answers}, indent=1))


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, last: the SHA-256 of every file, and `facts` of how the bundle came about.

    It holds no time, so that the same content has the same identity.
    """
    found = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_symlink() or not f.is_dir())
    listed = {name: files.sha256(folder / name) for name in found if name not in (MANIFEST, SIGNATURE)}
    origin = {"git_commit": _git_commit(), "python": platform.python_version()}
    files.write(folder / MANIFEST, document({**facts, **origin, "files": listed}))


def document(manifest: Mapping[str, Any]) -> bytes:
    """The content of a manifest's file."""
    return json.dumps(manifest, indent=1).encode()


def identity(path: Path) -> str:
    """The SHA-256 of a bundle's manifest, which has the hash of every other file: two bundles with the same
    identity are the same in all that counts. Raises BrokenBundle if there is no manifest."""
    manifest_of(path)
    return files.sha256(path / MANIFEST)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of the bundle in a folder, whose files are not looked at. Raises BrokenBundle."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        dict(manifest["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenBundle(f"{path}: is not a bundle: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenBundle(f"{path}: its {MANIFEST} cannot be read; {AGAIN}") from None
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all as it says; raises BrokenBundle if not.

    Files that are not in the manifest are ignored: other programs leave theirs, and nothing opens them.
    """
    manifest = manifest_of(path)
    listed = dict(manifest["files"])
    faults = [f"{name} is not a file that a bundle may have" for name in listed if not _allowed(path, name)]
    faults += [f"{name} is not in the manifest" for name in REQUIRED if name not in listed]
    for name, digest in listed.items():
        try:
            if files.sha256(path / name) != digest:
                faults.append(f"{name} was changed")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    if faults:
        raise BrokenBundle(f"{path}: {', '.join(sorted(faults))}; {AGAIN}")
    return manifest


def copy(source: Path, target: Path, manifest: bytes | None = None) -> None:
    """Copy a bundle's files, and no others, into an empty folder, with its manifest or another one.

    Raises BrokenBundle if they are not as the manifest says.
    """
    for name in verify(source)["files"]:
        files.copy(source / name, target / name)
    files.write(target / MANIFEST, manifest or (source / MANIFEST).read_bytes())
    verify(target)
    files.sync(target)


def require_passed(manifest: Mapping[str, Any], what: str) -> None:
    """Raises UserError unless the gate's decision is in a manifest and the model passed.

    `what` names the bundle, such as "income version 3".
    """
    decision = manifest.get("decision")
    if decision is None:
        raise UserError(
            f"{what} must have passed the gate, but its bundle holds no decision of it; train it again with "
            "`raylway train`, which keeps what is done already"
        )
    if not decision["passed"]:
        raise UserError(f"{what} must have passed the gate, which refused it: {decision['reason']}")


def _allowed(folder: Path, name: str) -> bool:
    """Whether it names a plain file of data, directly in the folder. A link could lead anywhere."""
    file = folder / name
    plain = name == file.name and not file.is_symlink()
    return plain and (file.suffix in KINDS or name == FLAVOR)


def _git_commit() -> str | None:
    """The commit of the code that runs, with `+` if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
