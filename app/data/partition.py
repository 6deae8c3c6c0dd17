"""The division of a data set into parts, stored with it and with its bundles.

It decides for any row whether a model may have been trained on it, so that a candidate and a champion are
compared on rows that neither was trained on.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from app.config import Data
from app.data import split

PARTITION_FILE = "split.json"
"""File of a prepared data set and of a bundle: the Partition of its rows."""
SEEN_FILE = "seen.parquet"
"""File beside PARTITION_FILE if the partition is by `last`: the `hash`, uint64, of each interaction outside
the test part."""


class Partition(BaseModel):
    """Division of a data set into parts.

    By content and by time the rule decides, also for rows that the data set lacks: a row that the rule puts
    outside the test part counts as seen. By `last` (leave one out) there is no rule: SEEN_FILE lists the
    rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: Literal["content", "time", "last"]
    key: dict[str, str] = {}
    """By content: types of the hashed columns, by name."""
    missing: list[str] = []
    """By content: markers of missing values (`data.missing`), which change the hashed values."""
    seed: int = 0
    test: float = 0.0
    """By content: share of the test part."""
    column: str = ""
    """By time: name of the column with the time."""
    start: float = 0.0
    """By time: start of the test part."""

    def obstacle(self, data: Data) -> str:
        """The reason why `unseen` cannot decide on rows of a data set; empty if it can."""
        if self.by == "time" and data.split.column != self.column:
            return f"its split is by the time in {self.column!r}, and data.split is not"
        for name, kind in self.key.items():
            if name not in data.columns:
                return f"its split is by {name!r}, which is no longer in data.columns"
            if data.columns[name].type != kind:
                return f"its split is by {name!r} as a {kind}, which is now a {data.columns[name].type}"
        if self.by == "content" and self.missing != sorted(data.missing):
            return f"its split is by values for which data.missing was {self.missing}, not {data.missing}"
        return ""

    def unseen(self, frame: pd.DataFrame, folder: Path) -> np.ndarray:
        """Mask of the rows of a prepared part on which no model of this data set was trained, bool (rows,).

        `folder` is the folder that the partition was read from. Raises KeyError if there is an `obstacle`.
        """
        if self.by == "content":
            return split.hash_positions(frame, list(self.key), self.seed) >= 1 - self.test
        if self.by == "time":
            return frame[split.TIME].to_numpy(np.float64) >= self.start
        seen = pd.read_parquet(folder / SEEN_FILE)["hash"].to_numpy()
        return ~np.isin(split.row_hashes(frame, list(self.key)), seen)


def read_partition(folder: Path) -> Partition | None:
    """The partition of a prepared data set or bundle; None if it was written before partitions existed."""
    file = folder / PARTITION_FILE
    return Partition.model_validate_json(file.read_text()) if file.exists() else None


def partition_of(data: Data, starts: tuple[float, ...] | None) -> Partition:
    """The partition that `split.assign_parts` makes with these settings and start times."""
    if starts is not None:
        return Partition(by="time", column=str(data.split.column), start=starts[-1])
    return Partition(
        by="content",
        key={name: data.columns[name].type for name in data.split_key},
        missing=sorted(data.missing),
        seed=data.split.seed,
        test=data.split.test,
    )


def with_partition_key(data: Data, partition: Partition | None) -> Data:
    """The data with the split key of an earlier partition, if columns were added since then and
    `data.split.key` is not set.

    Each row then stays in its part when the contract gets another column.
    """
    if data.split.key or data.split.by != "content" or data.interactions or partition is None:
        return data
    key = sorted(partition.key)
    if partition.by != "content" or partition.obstacle(data) or key == data.split_key:
        return data
    return data.model_copy(update={"split": data.split.model_copy(update={"key": key})})
