"""Explanations of a tabular model's answers: the contribution of every raw column to the output of a row.

    POST /v2/models/income/explain
    {"rows": [{"age": 39, "education": "Bachelors", ...}], "unit": "user-17"}

    {"model": "income", "variant": "champion", "version": "2", "request_id": "0f3c...",
     "of": "log-odds of >50K",
     "explanations": [{"output": 0.61, "base": -1.84, "attributions": {"age": 0.52, "education": 1.3, ...}}]}

`base` is the mean output over rows of the training data; `base` and all attributions sum to `output`. The
output of a model with several classes is the log-probability of the predicted class.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pandas as pd

from app.bundle.schema import Schema
from app.serving.http import Refused
from app.serving.protocols.contract import Answer, Columns, Query

NUM_WALKS = 32
"""Number of walks per explained row."""
MAX_ROWS = 16
"""Maximum number of rows in a request. A row costs as much as predicting `NUM_WALKS * (columns + 1)` rows."""
MAX_CELLS = 8_000_000
"""Maximum number of values in all points of a request (64 MB). The points of a row have
`NUM_WALKS * (columns + 1) * columns` values. A request with a single row may exceed the limit."""
MAX_CONCURRENT = 2
"""Maximum number of explanations that a replica computes at a time; further requests wait."""
TOLERANCE = 1e-3
"""Maximum difference between an output and the sum of its base and attributions, due to float32."""


class Attributions(NamedTuple):
    """The output of every row as a sum of its columns' contributions."""

    base: np.ndarray
    """Mean output over the background rows, float (rows,)."""
    output: np.ndarray
    """Output of the explained rows, float (rows,)."""
    by_column: np.ndarray
    """Contribution of every column, float (rows, columns)."""


class Walks:
    """Shapley values by sampled permutations: Strumbelj and Kononenko, "Explaining prediction models and
    individual predictions with feature contributions" (2014).

    A walk starts at a background row, a row of the training data, and replaces one column after the other by
    the value of the explained row. The change of the output at a step is attributed to its column. Walks come
    in pairs of opposite order, which at least halves the variance (Mitchell et al., "Sampling permutations
    for Shapley value estimation", 2022). All requests use the same walks.
    """

    def __init__(self, permutations: np.ndarray, background: Columns):
        """`permutations` is int (walks, columns): the order of the columns in every walk. `background` has
        one row per walk."""
        self._positions = np.argsort(permutations, axis=1)
        """Position of every column in every walk, int (walks, columns)."""
        self._background = background
        steps = np.arange(permutations.shape[1] + 1)
        self._is_replaced = self._positions[:, None, :] < steps[None, :, None]
        """Whether a column has the value of the explained row, bool (walks, steps, columns)."""

    def points(self, columns: Columns) -> Columns:
        """The rows to predict for the explained rows: arrays of the shape (rows * walks * steps,)."""
        points = {}
        for number, name in enumerate(self._background):
            rows, background = columns[name], self._background[name]
            is_replaced = self._is_replaced[None, :, :, number]
            points[name] = np.where(is_replaced, rows[:, None, None], background[None, :, None]).reshape(-1)
        return points

    def attributions(self, outputs: np.ndarray) -> Attributions:
        """Attribute the model's outputs for `points`, float (rows * walks * steps,), to the columns."""
        num_walks, num_columns = self._positions.shape
        by_walk = outputs.reshape(-1, num_walks, num_columns + 1)
        changes = np.diff(by_walk, axis=2)
        positions = np.broadcast_to(self._positions, changes.shape)
        by_column = np.take_along_axis(changes, positions, axis=2).mean(axis=1)
        return Attributions(by_walk[:, :, 0].mean(axis=1), by_walk[:, :, -1].mean(axis=1), by_column)


@cache
def sample_permutations(num_columns: int, num_walks: int = NUM_WALKS) -> np.ndarray:
    """Random permutations, int (walks, columns): the second half is the first half, each row reversed."""
    random = np.random.default_rng(0)
    half = np.array([random.permutation(num_columns) for _ in range(num_walks // 2)])
    return np.concatenate([half, half[:, ::-1]])


def load_walks(path: Path, schema: Schema) -> Walks:
    """Walks from rows of a bundle's training data. Raises Refused if the model is not tabular."""
    if schema.task == "ranking" or any(item.contract.type == "text" for item in schema.inputs):
        raise Refused(404, "only predictions of tabular models can be explained; this model is not tabular")
    names = [item.name for item in schema.inputs]
    reference = pd.read_parquet(path / "reference.parquet", columns=names)
    sample = reference.iloc[np.arange(NUM_WALKS // 2) % len(reference)]
    background = {}
    for item in schema.inputs:
        values = sample[item.name]
        if item.contract.type == "number":
            array = values.to_numpy(np.float64)
        else:
            array = values.astype(object).where(values.notna(), None).to_numpy()
        background[item.name] = np.concatenate([array, array])
    return Walks(sample_permutations(len(names)), background)


def explained_outputs(probabilities: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """The outputs that are explained, float64 (rows,), of probabilities (rows,) or (rows, classes).

    Log-odds if `classes` is None, else the log-probability of the class in `classes`, int (rows,).
    """
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    if classes is None:
        return np.log(p) - np.log1p(-p)
    return np.log(np.take_along_axis(p, classes[:, None], axis=1)[:, 0])


def max_rows(num_columns: int) -> int:
    """Maximum number of rows that a request may explain, for a table with `num_columns` columns."""
    num_cells = NUM_WALKS * (num_columns + 1) * num_columns
    return max(1, min(MAX_ROWS, MAX_CELLS // num_cells))


def require_num_rows(query: Query, schema: Schema) -> None:
    """Raise Refused with 413 if a request has too many rows."""
    limit = max_rows(len(schema.inputs))
    if query.num_rows > limit:
        raise Refused(413, f"too many rows to explain in one request: at most {limit}, not {query.num_rows}")


def encode(answer: Answer, schema: Schema, walks: Walks, point_probabilities: np.ndarray) -> bytes:
    """Encode the explanations of an answer as JSON.

    `point_probabilities` are the predictions for `Walks.points`, float (rows * walks * steps,) or
    (rows * walks * steps, classes).

    Raises RuntimeError if the attributions of a row do not sum to its output.
    """
    probabilities = answer.probabilities
    assert probabilities is not None
    num_points = len(point_probabilities) // len(probabilities)
    classes = probabilities.argmax(axis=1) if schema.task == "classes" else None
    point_classes = None if classes is None else np.repeat(classes, num_points)
    base, output, by_column = walks.attributions(explained_outputs(point_probabilities, point_classes))
    difference = np.abs(base + by_column.sum(axis=1) - explained_outputs(probabilities, classes)).max()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the attributions must sum to the output within {TOLERANCE:g}; they differ by {difference:.2g}"
        )
    names = [item.name for item in schema.inputs]
    explanations = [
        {"output": output[row], "base": base[row], "attributions": dict(zip(names, attributed, strict=True))}
        | ({} if classes is None else {"label": schema.classes[classes[row]]})
        for row, attributed in enumerate(by_column)
    ]
    document = {
        "model": answer.model,
        "variant": answer.variant,
        "version": answer.version,
        "request_id": answer.request_id,
        "of": f"log-odds of {schema.positive}" if classes is None else "log-probability of the label",
        "explanations": explanations,
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
