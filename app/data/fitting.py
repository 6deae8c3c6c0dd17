"""Fitting a preprocessor: statistics of each block of the training part, merged in the blocks' order."""

from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from app.config import Embedding, Encoding, NumberEncoding, PiecewiseLinear, Quantile, Tokens
from app.data.features import (
    MISSING,
    BinnedNumber,
    Categories,
    FrequentNumbers,
    Preprocessor,
    ScaledNumber,
)

MAX_DISTINCT_VALUES = 10_000
"""Maximum number of distinct values of a number in a block's statistics. If there are more, only quantiles or
only the most frequent values are kept."""
MAX_NORMAL_SCORE = 3.0
"""Maximum magnitude of normal scores; without it, those of the training part's extremes would be infinite."""
MATRIX_ORDER = ("min_max", "quantile", "piecewise_linear", "exact", "one_hot", "embedding")
"""Order of the encodings in the matrix."""


def block_statistics(frame: pd.DataFrame, features: Mapping[str, Encoding]) -> dict[str, Any]:
    """The statistics of one block that fitting needs, by column: small, mergeable JSON values."""
    statistics: dict[str, Any] = {}
    for name, encoding in features.items():
        if isinstance(encoding, Tokens):
            continue  # its encoder is pretrained
        values = frame[name]
        if isinstance(encoding, NumberEncoding):
            numbers = values.dropna().to_numpy(np.float64)
            if len(numbers):
                statistics[name] = _number_statistics(numbers, encoding)
        else:
            statistics[name] = sorted(values.where(values.notna(), MISSING).unique())
    return statistics


def _number_statistics(numbers: np.ndarray, encoding: NumberEncoding) -> dict[str, Any]:
    statistics: dict[str, Any] = {
        "minimum": float(numbers.min()),
        "maximum": float(numbers.max()),
        "sum": float(numbers.sum()),
        "count": len(numbers),
    }
    values, counts = np.unique(numbers, return_counts=True)
    if isinstance(encoding, Quantile | PiecewiseLinear):
        # If there are too many values, each quantile stands for the rows up to it: an error of at most
        # 1 / MAX_DISTINCT_VALUES of the rows.
        ends = np.arange(len(values))
        if len(values) > MAX_DISTINCT_VALUES:
            ranks = np.linspace(0, len(numbers), MAX_DISTINCT_VALUES)
            ends = np.union1d(0, np.minimum(np.searchsorted(counts.cumsum(), ranks), len(values) - 1))
        statistics["values"] = values[ends].tolist()
        statistics["counts"] = np.diff(counts.cumsum()[ends], prepend=0).tolist()
    if encoding.exact:
        frequent = np.sort(np.argsort(-counts, kind="stable")[:MAX_DISTINCT_VALUES])
        statistics["frequent"] = [values[frequent].tolist(), counts[frequent].tolist()]
    return statistics


def fit(blocks: Iterable[dict[str, Any]], features: Mapping[str, Encoding]) -> Preprocessor:
    """Fit a preprocessor on the statistics of all blocks, in order.

    A number that is missing in the whole training part is encoded as a constant.
    """
    blocks = list(blocks)
    columns: list[ScaledNumber | BinnedNumber | FrequentNumbers | Categories] = []
    for name, encoding in features.items():
        statistics = [block[name] for block in blocks if name in block]
        if isinstance(encoding, NumberEncoding):
            columns.append(_fit_number(name, statistics, encoding))
            if encoding.exact:
                columns.append(_fit_frequent(name, statistics, encoding.exact))
        elif not isinstance(encoding, Tokens):
            values = sorted(set().union(*statistics))
            width = encoding.width if isinstance(encoding, Embedding) else len(values)
            columns.append(Categories(column=name, encode=encoding.encode, values=values, width=width))
    return Preprocessor(columns=sorted(columns, key=lambda column: MATRIX_ORDER.index(column.encode)))


def _fit_number(
    name: str, statistics: list[dict[str, Any]], encoding: NumberEncoding
) -> ScaledNumber | BinnedNumber:
    minimum = min((s["minimum"] for s in statistics), default=0.0)
    maximum = max((s["maximum"] for s in statistics), default=0.0)
    count = sum(s["count"] for s in statistics)
    mean = sum(s["sum"] for s in statistics) / count if count else 0.0
    if maximum == minimum or not isinstance(encoding, Quantile | PiecewiseLinear):
        fill = (mean - minimum) / (maximum - minimum) if maximum > minimum else 0.0
        return ScaledNumber(column=name, minimum=minimum, maximum=maximum, fill=fill)
    values, counts = _merge_counts((s["values"], s["counts"]) for s in statistics)
    cumulative = counts.cumsum() / count
    quantiles = np.arange(1, encoding.bins) / encoding.bins
    inner = values[np.searchsorted(cumulative, quantiles - 1e-12)]
    edges = np.unique(np.array([minimum, *inner, maximum]))
    scores: list[float] = []
    if isinstance(encoding, Quantile):
        # A value that repeats covers a range of quantiles; its score is that of the middle of the range.
        index = np.searchsorted(values, edges)
        middle = cumulative[index] - counts[index] / count / 2
        largest = NormalDist().cdf(MAX_NORMAL_SCORE)
        scores = [NormalDist().inv_cdf(q) for q in np.clip(middle, 1 - largest, largest).tolist()]
    return BinnedNumber(column=name, encode=encoding.encode, edges=edges.tolist(), scores=scores, fill=mean)


def _fit_frequent(name: str, statistics: list[dict[str, Any]], min_count: int) -> FrequentNumbers:
    values, counts = _merge_counts(s["frequent"] for s in statistics)
    return FrequentNumbers(column=name, values=values[counts >= min_count].tolist())


def _merge_counts(parts: Iterable[tuple[list[float], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and the number of occurrences of each in all parts together."""
    parts = list(parts)
    all_values = np.array([value for values, _ in parts for value in values], dtype=np.float64)
    all_counts = np.array([count for _, counts in parts for count in counts], dtype=np.float64)
    values, index = np.unique(all_values, return_inverse=True)
    return values, np.bincount(index, weights=all_counts, minlength=len(values))
