"""Which part a row belongs to: a hash of its content, or its time; no order or file layout matters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from pydantic import BaseModel, ConfigDict

from app.config import Data, Split

PARTS = ("train", "validation", "test")
TIME = "__time__"
"""The column of a conformed frame that holds each row's time as a number, if the split goes by it."""
PARTITION = "split.json"
"""In a prepared data set and in a bundle: the Partition of its rows."""
SEEN = "seen.parquet"
"""Beside PARTITION, if it is by `last`: `hash`, uint64, of each interaction but those of the test part."""


class Partition(BaseModel):
    """How a data set was divided: tells of any row whether a model of that data set may have learnt from it.

    By content and by time the rule itself tells, also of rows that were not there yet: a row that the rule
    puts before the test part counts as seen. By `last` (leave one out) no rule does, so SEEN lists the rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: Literal["content", "time", "last"]
    key: dict[str, str] = {}
    """By content: the columns that are hashed, and their types."""
    missing: list[str] = []
    """By content: `data.missing`, which decides what is hashed where a value is missing."""
    seed: int = 0
    test: float = 0.0
    """By content: the share of the test part."""
    column: str = ""
    """By time: the column that says when."""
    start: float = 0.0
    """By time: when the test part begins."""

    def obstacle(self, data: Data) -> str:
        """Why `unseen` cannot be told of the rows of a data set; empty if it can."""
        if self.by == "time" and data.split.column != self.column:
            return f"its split goes by the time in {self.column!r}, and data.split does not"
        for name, kind in self.key.items():
            if name not in data.columns:
                return f"its split goes by {name!r}, which is no longer in data.columns"
            if data.columns[name].type != kind:
                return f"its split goes by {name!r} as a {kind}, which is now a {data.columns[name].type}"
        if self.by == "content" and self.missing != sorted(data.missing):
            return f"its split goes by values for which data.missing was {self.missing}, not {data.missing}"
        return ""

    def unseen(self, frame: pd.DataFrame, folder: Path) -> np.ndarray:
        """Which rows of a prepared part no model of this data set learnt from, bool (rows,).

        `folder` is where the partition was read from. Raises KeyError where `obstacle` is not empty.
        """
        if self.by == "content":
            return places(frame, list(self.key), self.seed) >= 1 - self.test
        if self.by == "time":
            return frame[TIME].to_numpy(np.float64) >= self.start
        seen = pd.read_parquet(folder / SEEN)["hash"].to_numpy()
        return ~np.isin(hashes(frame, list(self.key)), seen)


def partition_at(folder: Path) -> Partition | None:
    """The partition of a prepared data set or bundle; None if it is older than partitions."""
    file = folder / PARTITION
    return Partition.model_validate_json(file.read_text()) if file.exists() else None


def partition(data: Data, starts: tuple[float, ...] | None) -> Partition:
    """How `assign` divides the rows of a data set."""
    if starts is not None:
        return Partition(by="time", column=str(data.split.column), start=starts[-1])
    return Partition(
        by="content",
        key={name: data.columns[name].type for name in data.split_key},
        missing=sorted(data.missing),
        seed=data.split.seed,
        test=data.split.test,
    )


def carried(data: Data, before: Partition | None) -> Data:
    """The data with the key of an earlier partition, if the project file names none and columns were added.

    A row then stays in its part when the contract gets another column.
    """
    if data.split.key or data.split.by != "content" or data.interactions or before is None:
        return data
    if before.by != "content" or before.obstacle(data) or sorted(before.key) == data.split_key:
        return data
    return data.model_copy(update={"split": data.split.model_copy(update={"key": sorted(before.key)})})


def hashes(frame: pd.DataFrame, key: Sequence[str], seed: int = 0) -> np.ndarray:
    """A hash of each row's values in the columns of the key, uint64 (rows,); no order of columns matters."""
    columns = pd.DataFrame({name: _plain(frame[name]) for name in sorted(key)})
    return pd.util.hash_pandas_object(columns, index=False, hash_key=f"{seed:016d}"[:16]).to_numpy()


def places(frame: pd.DataFrame, key: Sequence[str], seed: int) -> np.ndarray:
    """Each row's hash as a number from 0 to 1, float64 (rows,)."""
    return hashes(frame, key, seed).astype(np.float64) / 2.0**64


def _plain(values: pd.Series) -> pd.Series:
    """As objects or floats: the same values have the same hash whatever they were read from."""
    if values.dtype.kind in "iufb":
        return values.astype(np.float64) + 0.0  # no negative zero
    return values.astype(object).where(values.notna(), None)


def assign(
    frame: pd.DataFrame, split: Split, key: Sequence[str], starts: tuple[float, ...] | None = None
) -> np.ndarray:
    """The part of each row, as an index into PARTS, shape (rows,); -1 is none.

    By content, rows that are equal in the columns of `key` fall into the same part, so a duplicate never
    stands in training and test both. By time, `starts` says when the parts after the first begin.
    """
    if starts is not None:
        parts = np.array([0, 1, 2] if len(starts) == 2 else [0, 1, -1, 2])
        return parts[np.digitize(frame[TIME].astype(np.float64), starts)]
    place = places(frame, key, split.seed)
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


def times(column: pa.ChunkedArray, missing: Sequence[str] = ()) -> pd.Series:
    """Timestamps, dates, ISO 8601 text and numbers as floats, of which later is larger.

    Timestamps, dates and ISO 8601 text become seconds since 1970. None where a value is missing, which the
    empty string and the texts in `missing` are too; text that is neither stays as it is.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_temporal(column.type):
        # In seconds, as text is below: a source may change from one to the other between two trainings.
        column = pa.compute.divide(column.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6)
    series = column.to_pandas()
    if series.dtype.kind in "iufb":
        return series.astype(object).where(series.notna(), None)
    text = series.astype(object).where(~series.isin(["", *missing]) & series.notna(), None)
    numbers = pd.to_numeric(text, errors="coerce")
    moments = pd.to_datetime(text, errors="coerce", utc=True, format="ISO8601")
    seconds = (moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    found = numbers.fillna(seconds)
    return found.astype(object).where(found.notna(), text)
