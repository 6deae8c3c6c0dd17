"""The bundle: an immutable folder with a graph and all that is needed to predict with it. Training makes it;
all later stages read it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
"""The only output of a graph that predicts a label, float32: the probability of the positive label (rows, 1),
or of each class (rows, classes)."""
ITEMS, SCORES, KNOWN = "items", "scores", "known"
"""The outputs of a graph that ranks items: strings and float32 (rows, n), and bool (rows,)."""
NUM_EXAMPLES = 8
MAX_EXAMPLE_DIFFERENCE = 1e-4
"""Largest difference to a stored prediction; of scores, relative to their size."""
TEXTS_PER_BATCH = 32

Columns: TypeAlias = Mapping[str, np.ndarray] | pd.DataFrame
"""An array (rows,) for each input, and perhaps others: of numbers, NaN if missing, or of strings, None if
missing."""


@dataclass(frozen=True)
class Ranking:
    """The best items for some users, best first, without those that the users have had."""

    items: np.ndarray
    """str (rows, n); empty strings at the end of a row where fewer items are left."""
    scores: np.ndarray
    """float32 (rows, n); comparable within a row only."""
    known: np.ndarray
    """bool (rows,): whether the user was in the training data. Other users get the most popular items."""


class Bundle:
    """A verified bundle, open for predictions. Safe to use from several threads."""

    def __init__(self, path: Path, *, sealed: bool = True):
        """Verify and open the bundle in a folder.

        A bundle that is still being made has no manifest and is not `sealed`. Raises BrokenBundle if a file
        of the manifest was changed or removed.
        """
        self.path = path
        self.manifest = verify(path) if sealed else {}
        self.schema = schema_at(path)
        self._session = open_graph(path / "model.onnx")
        # Open a tokenizer only if the manifest lists it: other programs may put files into the folder.
        has_tokenizer = (
            tokens.TOKENIZER_FILE in self.manifest["files"]
            if sealed
            else (path / tokens.TOKENIZER_FILE).exists()
        )
        self._tokenizer = tokens.load(path / tokens.TOKENIZER_FILE) if has_tokenizer else None

    def answer(self, columns: Columns) -> np.ndarray | Ranking:
        """A ranking of items from a recommender; from any other model, probabilities of a label."""
        return self.rank(columns) if self.schema.task == "ranking" else self.predict(columns)

    def predict(self, columns: Columns) -> np.ndarray:
        """Probabilities, float32: of the positive label (rows,), or of each class (rows, classes)."""
        arrays = self._inputs(columns)
        if self._tokenizer is None:
            probabilities = self._session.run([OUTPUT], feed_of(arrays))[0]
        else:
            (texts,) = arrays.values()
            probabilities = self._predict_texts(self._tokenizer, texts)
        return probabilities[:, 0] if self.schema.task == "binary" else probabilities

    def rank(self, columns: Columns) -> Ranking:
        """The best items for each user."""
        return Ranking(*self._session.run([ITEMS, SCORES, KNOWN], feed_of(self._inputs(columns))))

    def _inputs(self, columns: Columns) -> dict[str, np.ndarray]:
        return {item.name: np.asarray(columns[item.name]) for item in self.schema.inputs}

    def _predict_texts(self, tokenizer: "Tokenizer", texts: np.ndarray) -> np.ndarray:
        """Predict in batches of texts of similar length: the graph computes padding like text."""
        ids, lengths = tokens.encode(tokenizer, texts)
        probabilities = np.empty((len(texts), len(self.schema.classes)), dtype=np.float32)
        order = np.argsort(lengths, kind="stable")
        for rows in np.array_split(order, max(1, math.ceil(len(order) / TEXTS_PER_BATCH))):
            cut, mask = tokens.pad(ids[rows], lengths[rows])
            probabilities[rows] = self._session.run([OUTPUT], {"ids": cut, "mask": mask})[0]
        return probabilities

    def check_example(self) -> None:
        """Predict the stored example again. Raises BrokenBundle if the predictions differ from the stored
        ones."""
        example = json.loads((self.path / "example.json").read_text())
        answer = self.answer(columns_of(self.schema, example["rows"]))
        if isinstance(answer, Ranking):
            stored = np.array(example[SCORES])
            difference = float((np.abs(answer.scores - stored) / np.maximum(1, np.abs(stored))).max())
        else:
            difference = float(np.abs(answer - example[OUTPUT]).max())
        if not difference <= MAX_EXAMPLE_DIFFERENCE:
            raise BrokenBundle(
                f"{self.path}: must predict the values in its example.json, but they "
                f"differ by {difference:.2g}; restore the bundle, or train it again"
            )


def open_graph(model: Path) -> "onnxruntime.InferenceSession":
    """Open a graph with ONNX Runtime on one thread: serving scales by replicas, not by threads."""
    # Imported on first use: training imports this module and runs no graph.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feed_of(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert arrays (rows,) to what a graph is fed: float64, or str with MISSING for None and NaN."""
    feed = {}
    for name, values in columns.items():
        if values.dtype.kind in "fiub":
            feed[name] = values.astype(np.float64)
        else:
            # Faster than pandas' isna for the few rows of a request.
            feed[name] = np.array([MISSING if _is_missing(v) else v for v in values.tolist()], dtype=object)
    return feed


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value != value


def write_example(bundle: Bundle, frame: pd.DataFrame) -> None:
    """Store the first rows of a table with the bundle's predictions, for `Bundle.check_example` and as a
    first request."""
    head = frame[[item.name for item in bundle.schema.inputs]].head(NUM_EXAMPLES).astype(object)
    rows = head.where(head.notna(), None).to_dict("records")
    answer = bundle.answer(columns_of(bundle.schema, rows))
    if isinstance(answer, Ranking):
        predictions = {ITEMS: answer.items.tolist(), SCORES: answer.scores.tolist()}
    else:
        predictions = {OUTPUT: answer.tolist()}
    (bundle.path / "example.json").write_text(json.dumps({"rows": rows, **predictions}, indent=1))
