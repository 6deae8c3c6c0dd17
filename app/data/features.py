"""Encoding the columns of a contract as one float32 matrix, the same in training and in the ONNX graph.

`app.data.fitting` fits the preprocessor on the training part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

MISSING = ""
"""Text for a missing category in a list of values; the contract allows no empty string."""


class FittedColumn(BaseModel):
    """Encoding of one column, fitted on the training part."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    column: str


class ScaledNumber(FittedColumn):
    """A number scaled to 0..1: `clip((x - minimum) / (maximum - minimum), 0, 1)`."""

    encode: Literal["min_max"] = "min_max"
    minimum: float
    maximum: float
    fill: float
    """Scaled value of a missing number: the training mean."""

    @property
    def width(self) -> int:
        """Number of columns of the matrix."""
        return 1

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, 1)."""
        span = self.maximum - self.minimum
        scaled = (
            np.clip((values - self.minimum) / span, 0, 1) if span else np.where(np.isnan(values), np.nan, 0.0)
        )
        return np.where(np.isnan(scaled), self.fill, scaled).astype(np.float32)[:, None]


class BinnedNumber(FittedColumn):
    """A number encoded by its position among edges, which are quantiles of the training part.

    `piecewise_linear` gives one value per bin between two edges: 0 for a number below the bin, 1 above,
    linear inside. `quantile` gives the normal score of the number's quantile, linear between the edges.
    """

    encode: Literal["quantile", "piecewise_linear"]
    edges: list[float]
    """Ascending edges, at least two."""
    scores: list[float]
    """Normal score at each edge for `quantile`, else empty."""
    fill: float
    """Number that replaces a missing one, in the column's own unit: the training mean."""

    @property
    def width(self) -> int:
        """Number of columns of the matrix."""
        return 1 if self.scores else len(self.edges) - 1

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, width)."""
        edges = np.array(self.edges)
        filled = np.where(np.isnan(values), self.fill, values)[:, None]
        if self.scores:
            return np.interp(filled, edges, self.scores).astype(np.float32)
        return np.clip((filled - edges[:-1]) / np.diff(edges), 0, 1).astype(np.float32)


class FrequentNumbers(FittedColumn):
    """Indicators of a number's frequent values, in addition to its own encoding."""

    encode: Literal["exact"] = "exact"
    values: list[float]
    """Ascending values; empty if none is frequent enough."""

    @property
    def width(self) -> int:
        """Number of columns of the matrix."""
        return len(self.values)

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, width); all zeros for any other value."""
        return (values[:, None] == np.array(self.values)).astype(np.float32)


class Categories(FittedColumn):
    """A category encoded by its index among the values of the training part, from 1; 0 is an unseen value."""

    encode: Literal["one_hot", "embedding"]
    values: list[str]
    """Sorted values; MISSING is among them if a value was missing."""
    width: int
    """Number of columns of a one-hot encoding; length of an embedding's vectors."""

    def transform(self, values: np.ndarray) -> np.ndarray:
        """object (rows,), None for missing -> float32: indicators (rows, width) or indices (rows, 1)."""
        filled = np.where(pd.isna(values), MISSING, values)
        index = pd.Index(self.values, dtype=object).get_indexer(filled) + 1
        if self.encode == "embedding":
            return index.astype(np.float32)[:, None]
        return np.eye(len(self.values) + 1, dtype=np.float32)[index, 1:]


@dataclass(frozen=True)
class Layout:
    """Columns of the matrix: `dense` columns first, then one index column for each embedding."""

    dense: int
    """Number of dense columns."""
    embeddings: tuple[tuple[int, int], ...]
    """Number of values (the unseen one included) and vector length of each embedding."""
    numbers: tuple[int, ...] = ()
    """Width of each number; the numbers are the first dense columns."""

    @property
    def width(self) -> int:
        """Number of columns of the matrix."""
        return self.dense + len(self.embeddings)


class Preprocessor(BaseModel):
    """All encodings in the order of the matrix: numbers, frequent numbers, one-hot categories, embeddings.

    A number with `exact` has two encodings, its own and FrequentNumbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    columns: list[ScaledNumber | BinnedNumber | FrequentNumbers | Categories]

    @property
    def layout(self) -> Layout:
        """Layout of the matrix that `transform` returns."""
        embeddings = tuple(
            (len(c.values) + 1, c.width)
            for c in self.columns
            if isinstance(c, Categories) and c.encode == "embedding"
        )
        return Layout(
            dense=sum(c.width for c in self.columns if c.encode != "embedding"),
            embeddings=embeddings,
            numbers=tuple(c.width for c in self.columns if isinstance(c, ScaledNumber | BinnedNumber)),
        )

    def transform(self, frame: pd.DataFrame | Mapping[str, np.ndarray]) -> np.ndarray:
        """Columns of the contract -> float32 (rows, layout.width)."""
        return np.concatenate([c.transform(np.asarray(frame[c.column])) for c in self.columns], axis=1)
