"""Which part a row belongs to: a hash of its content, or its time; no order or file layout matters."""

import numpy as np
import pandas as pd
import pyarrow as pa

from app.config import Split

PARTS = ("train", "validation", "test")
TIME = "__time__"
"""The column of a conformed frame that holds each row's time as a number, if the split goes by it."""


def assign(
    frame: pd.DataFrame, split: Split, seed: int, starts: tuple[float, ...] | None = None
) -> np.ndarray:
    """The part of each row, as an index into PARTS, shape (rows,); -1 is none.

    By content, equal rows fall into the same part, so a duplicate never stands in training and test both.
    By time, `starts` says when the parts after the first begin.
    """
    if starts is not None:
        parts = np.array([0, 1, 2] if len(starts) == 2 else [0, 1, -1, 2])
        return parts[np.digitize(frame[TIME].astype(np.float64), starts)]
    # Sorted by name: the order of the contract's columns does not matter either.
    columns = frame[sorted(frame.columns)]
    hashes = pd.util.hash_pandas_object(columns, index=False, hash_key=f"{seed:016d}"[:16]).to_numpy()
    place = hashes.astype(np.float64) / 2.0**64
    if split.fold is None:
        return np.digitize(place, [1 - split.validation - split.test, 1 - split.test])
    i, k = split.fold
    fold = place / (1 - split.test) * k
    return np.select([place >= 1 - split.test, (i <= fold) & (fold < i + 1)], [2, 1], 0)


def starts(times: np.ndarray, counts: np.ndarray, split: Split) -> tuple[float, ...]:
    """The times from which rows belong to the validation part, of a fold to none, and to the test part.

    `times` and `counts` say how many rows are of which time, in any order. Rows of the same time stay
    together, in the earlier part; a part that begins at infinity has none.
    """
    order = np.argsort(times)
    before = counts[order].cumsum() - counts[order]
    shares = np.array([1 - split.validation - split.test, 1 - split.test])
    if split.fold is not None:
        i, k = split.fold
        first_of = 1 - split.test - (k - i) * split.validation
        shares = np.array([first_of, first_of + split.validation, 1 - split.test])
    # Rounded, or 0.7 of ten rows would be a little more than seven.
    first = np.searchsorted(before, np.round(shares * counts.sum(), 6))
    return tuple(float(time) for time in np.append(times[order], np.inf)[first])


def times(column: pa.ChunkedArray) -> pd.Series:
    """Timestamps, dates, ISO 8601 text and numbers as floats, of which later is larger.

    None where a value is missing; text that is neither stays as it is.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.timestamp("us")).cast(pa.int64())
    series = column.to_pandas()
    if series.dtype.kind in "iufb":
        return series.astype(object).where(series.notna(), None)
    text = series.astype(object).where(~series.isin([""]) & series.notna(), None)
    numbers = pd.to_numeric(text, errors="coerce")
    moments = pd.to_datetime(text, errors="coerce", utc=True, format="ISO8601")
    seconds = (moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    found = numbers.fillna(seconds)
    return found.astype(object).where(found.notna(), text)
