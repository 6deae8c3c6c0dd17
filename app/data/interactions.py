"""The prepare stage of a recommender: it divides interactions into those to train on and those held out.

Leave one out: each user's last interaction is in the test part, the one before it in the validation part, and
all others in the training part. Users with fewer than three interactions are in the training part only.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from app.config import Data
from app.data import contract, split
from app.data.partition import PARTITION_FILE, SEEN_FILE, Partition
from app.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

USER, ITEM, RATING, AGE = "__user__", "__item__", "__rating__", "__age__"
"""Columns of a part. On disk, USER and ITEM have their names in the contract. RATING is NaN without a rating;
AGE is the share, 0..1, of the user's interactions in the training part that came later."""
CATALOGUE_FILE = "catalogue.json"
MIN_INTERACTIONS = 3
"""Minimum number of a user's interactions for the last two to be held out."""


class Catalogue(BaseModel):
    """Users and items of a data set, and their indices in the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    users: list[str]
    """Sorted users. A user's index is one more than the position here; index 0 is an unknown user."""
    items: list[str]
    """Items by popularity, the most popular first, then by id. An item's index is its position here."""
    popularity: list[int]
    """Number of users who interacted with each item, outside the test part."""
    mean: float
    """Mean rating of the training part; 0 if there are no ratings."""

    def user_indices(self, users: Any) -> np.ndarray:
        """int64 (rows,); 0 for an unknown user."""
        return pd.Index(self.users, dtype=object).get_indexer(np.asarray(users, dtype=object)) + 1

    def item_indices(self, items: Any) -> np.ndarray:
        """int64 (rows,); -1 for an unknown item."""
        return pd.Index(self.items, dtype=object).get_indexer(np.asarray(items, dtype=object))


def read_catalogue(folder: Path) -> Catalogue:
    """The catalogue of a prepared data set or bundle."""
    return Catalogue.model_validate_json((folder / CATALOGUE_FILE).read_text())


def build(rows: "Dataset", data: Data, version: str, draft: Path) -> None:
    """Split checked rows of the source, and write the parts, the catalogue and the summary into a folder.

    Loads the interactions (four columns) into this process's memory. Raises UserError if no user has
    MIN_INTERACTIONS.
    """
    names = data.interactions
    assert names
    frame = rows.map_batches(_conformed, fn_args=(data,), batch_format="pyarrow", batch_size=None).to_pandas()
    parts = leave_one_out(frame)
    if parts["test"].empty:
        raise UserError(
            f"data.interactions: at least one user must have {MIN_INTERACTIONS} interactions or more, so "
            "that some can be held out for evaluation; no user has"
        )
    catalogue = fit_catalogue(parts)
    (draft / CATALOGUE_FILE).write_text(catalogue.model_dump_json(indent=1))
    stored = {name: part.rename(columns={USER: names.user, ITEM: names.item}) for name, part in parts.items()}
    for name, part in stored.items():
        (draft / name).mkdir()
        part.to_parquet(draft / name / "0.parquet", index=False)
    key = {names.user: "category", names.item: "category"}
    partition = Partition(by="last", key=key, missing=sorted(data.missing))
    (draft / PARTITION_FILE).write_text(partition.model_dump_json(indent=1))
    seen = pd.concat([stored["train"], stored["validation"]])
    seen_hashes = np.unique(split.row_hashes(seen, list(key)))
    pd.DataFrame({"hash": seen_hashes}).to_parquet(draft / SEEN_FILE, index=False)
    summary = {
        "data_version": version,
        "rows": sum(len(part) for part in parts.values()),
        "users": len(catalogue.users),
        "items": len(catalogue.items),
        "parts": {name: {"rows": len(part), "users": part[USER].nunique()} for name, part in parts.items()},
    }
    (draft / "summary.json").write_text(json.dumps(summary, indent=1))


def leave_one_out(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The parts of a frame with USER, ITEM, RATING and `split.TIME`.

    Of a user's several interactions with one item, the last counts. Interactions of the same time (nearly
    half of the users of MovieLens rated several films in their last second) are ordered by a hash of user and
    item: an order that depends on the items, such as that of their ids, would make the last one easier or
    harder to predict.
    """
    hashes = pd.util.hash_pandas_object(frame[[USER, ITEM]].astype(object), index=False)
    frame = frame.assign(hash=hashes.to_numpy()).sort_values([USER, split.TIME, "hash", RATING])
    frame = frame.drop_duplicates([USER, ITEM], keep="last")
    by_user = frame.groupby(USER, sort=False)
    num_later, count = by_user.cumcount(ascending=False), by_user[ITEM].transform("size")
    num_held_out = np.where(count < MIN_INTERACTIONS, 0, 2)
    frame[AGE] = ((num_later - num_held_out) / (count - num_held_out)).astype(np.float32)
    # Sort by the hash, so that the users are spread over the training part and each rank sees all of them.
    parts = {
        "train": frame[num_later >= num_held_out].sort_values("hash"),
        "validation": frame[(num_held_out > 0) & (num_later == 1)],
        "test": frame[(num_held_out > 0) & (num_later == 0)],
    }
    return {name: part[[USER, ITEM, RATING, AGE]].reset_index(drop=True) for name, part in parts.items()}


def fit_catalogue(parts: dict[str, pd.DataFrame]) -> Catalogue:
    """The catalogue of all parts; an item that is only in the test part has popularity 0."""
    counts = pd.concat([parts["train"][ITEM], parts["validation"][ITEM]]).value_counts()
    items = pd.Series(0, index=sorted(set().union(*(part[ITEM] for part in parts.values()))), dtype=np.int64)
    items = items.add(counts, fill_value=0).astype(np.int64).sort_values(ascending=False, kind="stable")
    mean = parts["train"][RATING].mean()
    return Catalogue(
        users=sorted(set().union(*(part[USER] for part in parts.values()))),
        items=list(items.index),
        popularity=items.tolist(),
        mean=0.0 if np.isnan(mean) else float(mean),
    )


def _conformed(block: pa.Table, data: Data) -> pa.Table:
    frame, _ = contract.conform(block, data)
    names = data.interactions
    assert names
    ratings = frame[names.rating] if names.rating else np.full(len(frame), np.nan)
    return pa.table(
        {
            USER: pa.array(frame[names.user], pa.string()),
            ITEM: pa.array(frame[names.item], pa.string()),
            RATING: pa.array(ratings, pa.float64()),
            split.TIME: pa.array(frame[split.TIME], pa.float64()),
        }
    )
