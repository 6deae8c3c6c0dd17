"""The bundle: the immutable directory that training makes and everything else consumes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from app.bundle.manifest import BrokenBundle, verify
from app.bundle.schema import columns_of, schema_at
from app.data import tokens
from app.data.features import MISSING

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

OUTPUT = "probability"
"""The graph's only output, float32: the probability of the positive label (rows, 1), or of each class
(rows, classes)."""
ITEMS, SCORES, KNOWN = "items", "scores", "known"
"""A recommender's outputs: strings and float32 (rows, n), and bool (rows,)."""
NUM_EXAMPLES = 8
TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Ranking:
    """The best items for some users, best first, without those that they have had."""

    items: np.ndarray
    """str (rows, n); empty strings at the end where fewer are left."""
    scores: np.ndarray
    """float32 (rows, n): comparable within a row alone."""
    known: np.ndarray
    """bool (rows,): whether training saw the user; who is not known gets the most popular items."""


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
