"""Why a table's model answers as it does: how much each raw column of a row adds to the answer.

    POST /v2/models/income/explain
    {"rows": [{"age": 39, "education": "Bachelors", ...}], "unit": "user-17"}

    {"model": "income", "variant": "champion", "version": "2", "request_id": "0f3c...",
     "of": "log-odds of >50K",
     "explanations": [{"output": 0.61, "base": -1.84, "attributions": {"age": 0.52, "education": 1.3, ...}}]}

`base` is the mean output over rows of the training data, and `base` and all attributions sum to `output`. Of
a model of several classes it is the log-probability of the class that the row gets.
"""

from functools import cache
from pathlib import Path

import numpy as np
import orjson
import pandas as pd

from app.bundle.schema import Schema
from app.serving.http import Refused
from app.serving.protocols.contract import Answer, Columns, Query

NUM_WALKS = 32
MAX_ROWS = 16
"""In one request: each takes as long as `NUM_WALKS * (columns + 1)` rows of a prediction."""
MAX_CELLS = 8_000_000
"""Values of all points of a request, which grow with the square of the columns: 64 MB. One row is explained
even if it has more."""
MAX_AT_ONCE = 2
"""Explanations that a replica computes at once; more wait."""
TOLERANCE = 1e-3
"""Of the sum: probabilities are float32."""


class Walks:
    """Shapley values by sampled permutations: Strumbelj and Kononenko, "Explaining prediction models and
    individual predictions with feature contributions" (2014).

    Each walk begins at a row of the training data, and takes over the explained row's columns one after the
    other; what the output changes by at a step is put down to its column. Walks come in pairs, one the other
    backwards, which halves the variance and more (Mitchell et al., "Sampling permutations for Shapley value
    estimation", 2022). The walks are the same for every request.
    """

    def __init__(self, orders: np.ndarray, background: Columns):
        """`orders` is int (walks, columns), each row a permutation; `background` has a row for each walk."""
        self._orders = orders
        self._background = background
        # Of each walk, step and column: whether it is the explained row's by then.
        places = np.argsort(orders, axis=1)
        self._taken = places[:, None, :] < np.arange(orders.shape[1] + 1)[None, :, None]

    def points(self, columns: Columns) -> Columns:
        """The rows to be predicted, for explained rows: (rows * walks * steps,) of each column."""
        found = {}
        for number, name in enumerate(self._background):
            rows, background = columns[name], self._background[name]
            taken = self._taken[None, :, :, number]
            found[name] = np.where(taken, rows[:, None, None], background[None, :, None]).reshape(-1)
        return found

    def attributions(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From the outputs of `points`: of each row the base and the output (rows,), and what each column
        adds (rows, columns)."""
        num_walks, num_columns = self._orders.shape
        walked = outputs.reshape(-1, num_walks, num_columns + 1)
        steps = np.diff(walked, axis=2)
        places = np.broadcast_to(np.argsort(self._orders, axis=1), steps.shape)
        added = np.take_along_axis(steps, places, axis=2).mean(axis=1)
        return walked[:, :, 0].mean(axis=1), walked[:, :, -1].mean(axis=1), added


@cache
def orders(num_columns: int, num_walks: int = NUM_WALKS) -> np.ndarray:
    """Permutations, int (walks, columns), in pairs of which one is the other backwards."""
    random = np.random.default_rng(0)
    half = np.array([random.permutation(num_columns) for _ in range(num_walks // 2)])
    return np.concatenate([half, half[:, ::-1]])


def walks(path: Path, schema: Schema) -> Walks:
    """Those of a bundle, that begin at rows of its training data. Raises Refused if it is no table's."""
    if schema.task == "ranking" or any(item.contract.type == "text" for item in schema.inputs):
        raise Refused(404, "only models of tables are explained, and this is none")
    names = [item.name for item in schema.inputs]
    reference = pd.read_parquet(path / "reference.parquet", columns=names)
    chosen = reference.iloc[np.arange(NUM_WALKS // 2) % len(reference)]
    background = {}
    for item in schema.inputs:
        values = chosen[item.name]
        if item.contract.type == "number":
            array = values.to_numpy(np.float64)
        else:
            array = values.astype(object).where(values.notna(), None).to_numpy()
        background[item.name] = np.concatenate([array, array])
    return Walks(orders(len(names)), background)


def outputs(probabilities: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """What is explained, float64 (rows,): log-odds, or the log-probability of each row's class in
    `classes`."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    if classes is None:
        return np.log(p) - np.log1p(-p)
    return np.log(np.take_along_axis(p, classes[:, None], axis=1)[:, 0])


def max_rows(num_columns: int) -> int:
    """How many rows of a table with so many columns are explained in one request."""
    cells = NUM_WALKS * (num_columns + 1) * num_columns
    return max(1, min(MAX_ROWS, MAX_CELLS // cells))


def check(query: Query, schema: Schema) -> None:
    """Raises Refused if there are too many rows."""
    most = max_rows(len(schema.inputs))
    if query.num_rows > most:
        raise Refused(413, f"too many rows to explain in one request: at most {most}")


def encode(given: Answer, schema: Schema, walked: Walks, probabilities: np.ndarray) -> bytes:
    """The answer; `probabilities` are those of the points. Raises RuntimeError if the sums are not the
    answers."""
    assert given.probabilities is not None
    num_points = len(probabilities) // len(given.probabilities)
    classes = given.probabilities.argmax(axis=1) if schema.task == "classes" else None
    repeated = None if classes is None else np.repeat(classes, num_points)
    base, reached, added = walked.attributions(outputs(probabilities, repeated))
    off = np.abs(base + added.sum(axis=1) - outputs(given.probabilities, classes)).max()
    if not off <= TOLERANCE:
        raise RuntimeError(f"attributions sum to something else than the answer, by {off:.2g}")
    of = f"log-odds of {schema.positive}" if classes is None else "log-probability of the label"
    names = [item.name for item in schema.inputs]
    document = {
        "model": given.model,
        "variant": given.variant,
        "version": given.version,
        "request_id": given.request_id,
        "of": of,
        "explanations": [
            {"output": output, "base": start, "attributions": dict(zip(names, row, strict=True))}
            | ({} if classes is None else {"label": schema.classes[classes[number]]})
            for number, (output, start, row) in enumerate(zip(reached, base, added, strict=True))
        ],
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
