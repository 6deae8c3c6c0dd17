"""The assignment of rows to parts, by a hash of their content or by time.

The order of the rows and the layout of the files have no influence.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from app.config import Split

PARTS = ("train", "validation", "test")
TIME = "__time__"
"""Column of a conformed frame with each row's time as a number, if the split is by time."""


def row_hashes(frame: pd.DataFrame, key: Sequence[str], seed: int = 0) -> np.ndarray:
    """A hash of each row's values in the columns of `key`, uint64 (rows,).

    The order of the columns and the source's types have no influence.
    """
    columns = pd.DataFrame({name: _canonical(frame[name]) for name in sorted(key)})
    return pd.util.hash_pandas_object(columns, index=False, hash_key=f"{seed:016d}"[:16]).to_numpy()


def hash_positions(frame: pd.DataFrame, key: Sequence[str], seed: int) -> np.ndarray:
    """Each row's hash scaled to 0..1, float64 (rows,)."""
    return row_hashes(frame, key, seed).astype(np.float64) / 2.0**64


def _canonical(values: pd.Series) -> pd.Series:
    """The values as float64 or objects, so that equal values have equal hashes."""
    if values.dtype.kind in "iufb":
        return values.astype(np.float64) + 0.0  # turns -0.0 into 0.0
    return values.astype(object).where(values.notna(), None)


def assign_parts(
    frame: pd.DataFrame, split: Split, key: Sequence[str], starts: tuple[float, ...] | None = None
) -> np.ndarray:
    """Each row's part as an index into PARTS, (rows,); -1 for a row that belongs to none.

    By content, rows with equal values in the columns of `key` get the same part, so that no duplicate is in
    both training and test part. By time, `starts` are the start times of `part_starts`.
    """
    if starts is not None:
        parts = np.array([0, 1, 2] if len(starts) == 2 else [0, 1, -1, 2])
        return parts[np.digitize(frame[TIME].astype(np.float64), starts)]
    positions = hash_positions(frame, key, split.seed)
    if split.fold is None:
        return np.digitize(positions, [1 - split.validation - split.test, 1 - split.test])
    fold, num_folds = split.fold
    row_folds = positions / (1 - split.test) * num_folds
    is_test, is_validation = positions >= 1 - split.test, (fold <= row_folds) & (row_folds < fold + 1)
    return np.select([is_test, is_validation], [2, 1], 0)


def part_starts(times: np.ndarray, counts: np.ndarray, split: Split) -> tuple[float, ...]:
    """Start times of the parts after the training part: validation and test; for a fold also that of the
    unused rows between them.

    `counts` (times,) are the numbers of rows at each of the `times` (times,), in any order. Rows of the
    same time stay together, in the earlier part. The start of an empty part is infinity.
    """
    order = np.argsort(times)
    num_earlier = counts[order].cumsum() - counts[order]
    shares = np.array([1 - split.validation - split.test, 1 - split.test])
    if split.fold is not None:
        fold, num_folds = split.fold
        validation_start = 1 - split.test - (num_folds - fold) * split.validation
        shares = np.array([validation_start, validation_start + split.validation, 1 - split.test])
    # Round, because 0.7 * 10 is a little more than 7 in floating point.
    first = np.searchsorted(num_earlier, np.round(shares * counts.sum(), 6))
    return tuple(float(time) for time in np.append(times[order], np.inf)[first])


def parse_times(column: pa.ChunkedArray, missing: Sequence[str] = ()) -> pd.Series:
    """Times as floats that increase with time: timestamps, dates and ISO 8601 text in seconds since 1970,
    numbers unchanged.

    None where a value is missing, which null, the empty string and the texts in `missing` are. Other text is
    returned unchanged.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_temporal(column.type):
        # In seconds like text, because a source may change its type between two trainings.
        column = pa.compute.divide(column.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6)
    series = column.to_pandas()
    if series.dtype.kind in "iufb":
        return series.astype(object).where(series.notna(), None)
    text = series.astype(object).where(~series.isin(["", *missing]) & series.notna(), None)
    numbers = pd.to_numeric(text, errors="coerce")
    dates = pd.to_datetime(text, errors="coerce", utc=True, format="ISO8601")
    seconds = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    times = numbers.fillna(seconds)
    return times.astype(object).where(times.notna(), text)
