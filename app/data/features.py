"""From raw columns to one float32 matrix: fitted on the training part, the same in training and ONNX."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from app.config import Embedding, Encoding

MISSING = ""
"""How a missing category stands in a list of values; the contract lets no empty string through."""


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

    def transform(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows,) with NaN for missing -> float32 (rows, 1)."""
        span = self.maximum - self.minimum
        scaled = (
            np.clip((values - self.minimum) / span, 0, 1) if span else np.where(np.isnan(values), np.nan, 0.0)
        )
        return np.where(np.isnan(scaled), self.fill, scaled).astype(np.float32)[:, None]


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

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.dense + len(self.embeddings)


class Preprocessor(BaseModel):
    """All columns' encodings, in the order of the matrix: numbers, one-hots, embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    columns: list[Scaled | Categories]

    @property
    def layout(self) -> Layout:
        dense = sum(1 if isinstance(c, Scaled) else c.width for c in self.columns if c.encode != "embedding")
        tables = tuple(
            (len(c.values) + 1, c.width)
            for c in self.columns
            if isinstance(c, Categories) and c.encode == "embedding"
        )
        return Layout(dense, tables)

    def transform(self, frame: pd.DataFrame | Mapping[str, np.ndarray]) -> np.ndarray:
        """Raw columns -> float32 (rows, layout.width)."""
        return np.concatenate([c.transform(np.asarray(frame[c.column])) for c in self.columns], axis=1)


def block_statistics(frame: pd.DataFrame, features: Mapping[str, Encoding]) -> dict[str, Any]:
    """What fitting needs of one block, small and mergeable: JSON values by column."""
    statistics: dict[str, Any] = {}
    for name, encoding in features.items():
        values = frame[name]
        if encoding.encode == "min_max":
            numbers = values.dropna()
            if len(numbers):
                statistics[name] = [
                    float(numbers.min()),
                    float(numbers.max()),
                    float(numbers.sum()),
                    len(numbers),
                ]
        else:
            statistics[name] = sorted(values.where(values.notna(), MISSING).unique())
    return statistics


def fit(blocks: Iterable[dict[str, Any]], features: Mapping[str, Encoding]) -> Preprocessor:
    """Merge the blocks' statistics, in order, into a preprocessor.

    A number that is missing in the whole training part is 0 everywhere.
    """
    blocks = list(blocks)
    columns: list[Scaled | Categories] = []
    for name, encoding in features.items():
        parts = [block[name] for block in blocks if name in block]
        if encoding.encode == "min_max":
            low = float(min((p[0] for p in parts), default=0))
            high = float(max((p[1] for p in parts), default=0))
            count = sum(p[3] for p in parts)
            mean = sum(p[2] for p in parts) / count if count else 0.0
            fill = float((mean - low) / (high - low)) if high > low else 0.0
            columns.append(Scaled(column=name, minimum=low, maximum=high, fill=fill))
        else:
            values = sorted(set().union(*parts))
            width = encoding.width if isinstance(encoding, Embedding) else len(values)
            columns.append(Categories(column=name, encode=encoding.encode, values=values, width=width))
    order = ["min_max", "one_hot", "embedding"]
    return Preprocessor(columns=sorted(columns, key=lambda c: order.index(c.encode)))
