"""From raw columns to one float32 matrix: fitted on the training part, the same in training and ONNX."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from app.config import Embedding, Encoding, NumberEncoding, PiecewiseLinear, Quantile, Tokens

MISSING = ""
"""How a missing category stands in a list of values; the contract lets no empty string through."""
MAX_VALUES = 10_000
"""Different values of a number that a block's statistics hold; of more, quantiles or the most frequent."""
LARGEST_SCORE = 3.0
"""Normal scores end here: the training part's ends would be infinite."""


class Fitted(BaseModel):
    """What one column's encoding learnt from the training part."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    column: str


class Scaled(Fitted):
    """A number, scaled to 0..1: `clip((x - minimum) / (maximum - minimum), 0, 1)`."""

    encode: Literal["min_max"] = "min_max"
    minimum: float
    maximum: float
    fill: float
    """What stands for a missing value: the training mean, scaled."""

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return 1

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, 1)."""
        span = self.maximum - self.minimum
        scaled = (
            np.clip((values - self.minimum) / span, 0, 1) if span else np.where(np.isnan(values), np.nan, 0.0)
        )
        return np.where(np.isnan(scaled), self.fill, scaled).astype(np.float32)[:, None]


class Binned(Fitted):
    """A number, placed among quantiles of the training part, its edges.

    Of each bin between two edges, the share that the number has come through: 0 below, 1 above, linear
    inside. `piecewise_linear` is these shares; `quantile` the normal score of the number's quantile, linear
    between the edges, which is the shares' sum weighted by the scores' differences.
    """

    encode: Literal["quantile", "piecewise_linear"]
    edges: list[float]
    """Ascending, at least two."""
    scores: list[float]
    """Of `quantile`: the normal score at each edge; else empty."""
    fill: float
    """What stands for a missing value: the training mean, unscaled."""

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return 1 if self.scores else len(self.edges) - 1

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, width)."""
        edges = np.array(self.edges)
        filled = np.where(np.isnan(values), self.fill, values)[:, None]
        if self.scores:
            return np.interp(filled, edges, self.scores).astype(np.float32)
        return np.clip((filled - edges[:-1]) / np.diff(edges), 0, 1).astype(np.float32)


class Exact(Fitted):
    """Indicators of a number's frequent values, beside its scale."""

    encode: Literal["exact"] = "exact"
    values: list[float]
    """Ascending; none may be frequent enough."""

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return len(self.values)

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, width); all zeros for any other value."""
        return (values[:, None] == np.array(self.values)).astype(np.float32)


class Categories(Fitted):
    """A category: its place among the values of the training part, from 1; 0 is a value never seen."""

    encode: Literal["one_hot", "embedding"]
    values: list[str]
    """Sorted; MISSING among them if it occurred."""
    width: int
    """Columns of the matrix that a one-hot takes; length of an embedding's vectors."""

    def transform(self, values: np.ndarray) -> np.ndarray:
        """object (rows,), None for missing -> float32: indicators (rows, width), or places (rows, 1)."""
        filled = np.where(pd.isna(values), MISSING, values)
        place = pd.Index(self.values, dtype=object).get_indexer(filled) + 1
        if self.encode == "embedding":
            return place.astype(np.float32)[:, None]
        return np.eye(len(self.values) + 1, dtype=np.float32)[place, 1:]


@dataclass(frozen=True)
class Layout:
    """What the columns of the matrix are: `dense` of them first, then a place for each embedding."""

    dense: int
    embeddings: tuple[tuple[int, int], ...]
    """Of each embedding: number of values (unseen included), length of a vector."""
    numbers: tuple[int, ...] = ()
    """Of the dense columns, the first ones: how many each number takes."""

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.dense + len(self.embeddings)


class Preprocessor(BaseModel):
    """All encodings, in the order of the matrix: numbers, their frequent values, one-hots, embeddings.

    A number whose frequent values have indicators stands twice, as itself and as `Exact`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    columns: list[Scaled | Binned | Exact | Categories]

    @property
    def layout(self) -> Layout:
        tables = tuple(
            (len(c.values) + 1, c.width)
            for c in self.columns
            if isinstance(c, Categories) and c.encode == "embedding"
        )
        return Layout(
            dense=sum(c.width for c in self.columns if c.encode != "embedding"),
            embeddings=tables,
            numbers=tuple(c.width for c in self.columns if isinstance(c, Scaled | Binned)),
        )

    def transform(self, frame: pd.DataFrame | Mapping[str, np.ndarray]) -> np.ndarray:
        """Raw columns -> float32 (rows, layout.width)."""
        return np.concatenate([c.transform(np.asarray(frame[c.column])) for c in self.columns], axis=1)


def block_statistics(frame: pd.DataFrame, features: Mapping[str, Encoding]) -> dict[str, Any]:
    """What fitting needs of one block, small and mergeable: JSON values by column."""
    statistics: dict[str, Any] = {}
    for name, encoding in features.items():
        if isinstance(encoding, Tokens):
            continue  # pretrained
        values = frame[name]
        if isinstance(encoding, NumberEncoding):
            numbers = values.dropna().to_numpy(np.float64)
            if len(numbers):
                statistics[name] = _number_statistics(numbers, encoding)
        else:
            statistics[name] = sorted(values.where(values.notna(), MISSING).unique())
    return statistics


def _number_statistics(numbers: np.ndarray, encoding: NumberEncoding) -> dict[str, Any]:
    found: dict[str, Any] = {
        "minimum": float(numbers.min()),
        "maximum": float(numbers.max()),
        "sum": float(numbers.sum()),
        "count": len(numbers),
    }
    values, counts = np.unique(numbers, return_counts=True)
    if isinstance(encoding, Quantile | PiecewiseLinear):
        # Of too many values, quantiles stand for the rows up to them: off by 1 / MAX_VALUES of the rows.
        ends = np.arange(len(values))
        if len(values) > MAX_VALUES:
            marks = np.linspace(0, len(numbers), MAX_VALUES)
            ends = np.union1d(0, np.minimum(np.searchsorted(counts.cumsum(), marks), len(values) - 1))
        found["values"] = values[ends].tolist()
        found["counts"] = np.diff(counts.cumsum()[ends], prepend=0).tolist()
    if encoding.exact:
        most = np.sort(np.argsort(-counts, kind="stable")[:MAX_VALUES])
        found["frequent"] = [values[most].tolist(), counts[most].tolist()]
    return found


def fit(blocks: Iterable[dict[str, Any]], features: Mapping[str, Encoding]) -> Preprocessor:
    """Merge the blocks' statistics, in order, into a preprocessor.

    A number that is missing in the whole training part is the same everywhere.
    """
    blocks = list(blocks)
    columns: list[Scaled | Binned | Exact | Categories] = []
    for name, encoding in features.items():
        parts = [block[name] for block in blocks if name in block]
        if isinstance(encoding, NumberEncoding):
            columns.append(_fit_number(name, parts, encoding))
            if encoding.exact:
                columns.append(_fit_exact(name, parts, encoding.exact))
        elif not isinstance(encoding, Tokens):
            values = sorted(set().union(*parts))
            width = encoding.width if isinstance(encoding, Embedding) else len(values)
            columns.append(Categories(column=name, encode=encoding.encode, values=values, width=width))
    order = ["min_max", "quantile", "piecewise_linear", "exact", "one_hot", "embedding"]
    return Preprocessor(columns=sorted(columns, key=lambda c: order.index(c.encode)))


def _fit_number(name: str, parts: list[dict[str, Any]], encoding: NumberEncoding) -> Scaled | Binned:
    low = min((p["minimum"] for p in parts), default=0.0)
    high = max((p["maximum"] for p in parts), default=0.0)
    count = sum(p["count"] for p in parts)
    mean = sum(p["sum"] for p in parts) / count if count else 0.0
    if high == low or not isinstance(encoding, Quantile | PiecewiseLinear):
        fill = (mean - low) / (high - low) if high > low else 0.0
        return Scaled(column=name, minimum=low, maximum=high, fill=fill)
    values, counts = _merged((p["values"], p["counts"]) for p in parts)
    shares = counts.cumsum() / count
    marks = np.arange(1, encoding.bins) / encoding.bins
    inner = values[np.searchsorted(shares, marks - 1e-12)]
    edges = np.unique(np.array([low, *inner, high]))
    scores: list[float] = []
    if isinstance(encoding, Quantile):
        # A value that repeats takes up a span of quantiles, and stands in its middle.
        place = np.searchsorted(values, edges)
        middle = shares[place] - counts[place] / count / 2
        largest = NormalDist().cdf(LARGEST_SCORE)
        scores = [NormalDist().inv_cdf(m) for m in np.clip(middle, 1 - largest, largest).tolist()]
    return Binned(column=name, encode=encoding.encode, edges=edges.tolist(), scores=scores, fill=mean)


def _fit_exact(name: str, parts: list[dict[str, Any]], least: int) -> Exact:
    values, counts = _merged(p["frequent"] for p in parts)
    return Exact(column=name, values=values[counts >= least].tolist())


def _merged(parts: Iterable[tuple[list[float], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Different values, ascending, and how often each occurs in all parts together."""
    parts = list(parts)
    all_values = np.array([value for values, _ in parts for value in values], dtype=np.float64)
    all_counts = np.array([count for _, counts in parts for count in counts], dtype=np.float64)
    values, place = np.unique(all_values, return_inverse=True)
    return values, np.bincount(place, weights=all_counts, minlength=len(values))
