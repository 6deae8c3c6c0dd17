"""The first stage of a recommender: whose interactions with what are learnt from, and which are held out.

Leave one out: of each user the last interaction is in the test part, the one before it in the validation
part, and all others are in the training part; users with fewer than three are in the training part alone.
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
from app.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

USER, ITEM, RATING, AGE = "__user__", "__item__", "__rating__", "__age__"
"""The columns of a part; on disk USER and ITEM have the names that the contract gives them. RATING is NaN
where there is none; AGE is the share, 0..1, of the user's interactions in the training part that came later.
"""
CATALOGUE = "catalogue.json"
FEWEST = 3
"""Interactions of a user of whom two can be held out."""


class Catalogue(BaseModel):
    """Who and what there is."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    users: list[str]
    """Sorted; a user's place is one more than here, because 0 is whoever is not among them."""
    items: list[str]
    """By how many users had them, the most popular first, then by id; an item's place is the one here."""
    popularity: list[int]
    """How many users had each item, but for the test part."""
    mean: float
    """Of the ratings of the training part; 0 if there are none."""

    def user_places(self, users: Any) -> np.ndarray:
        """int64 (rows,)"""
        return pd.Index(self.users, dtype=object).get_indexer(np.asarray(users, dtype=object)) + 1

    def item_places(self, items: Any) -> np.ndarray:
        """int64 (rows,)"""
        return pd.Index(self.items, dtype=object).get_indexer(np.asarray(items, dtype=object))


def catalogue(folder: Path) -> Catalogue:
    """That of a prepared data set."""
    return Catalogue.model_validate_json((folder / CATALOGUE).read_text())


def build(rows: "Dataset", data: Data, version: str, draft: Path) -> None:
    """Split checked rows of the source and write the parts, the catalogue and the summary.

    Takes the interactions (four columns of them) into this process's memory. Raises UserError if no user has
    enough of them.
    """
    of = data.interactions
    assert of
    frame = rows.map_batches(_conformed, fn_args=(data,), batch_format="pyarrow", batch_size=None).to_pandas()
    parts = leave_one_out(frame)
    if parts["test"].empty:
        raise UserError(
            f"data.interactions: no user has {FEWEST} interactions or more, so none can be held out to tell "
            "how good the recommendations are"
        )
    found = fit(parts)
    for name, part in parts.items():
        (draft / name).mkdir()
        named = part.rename(columns={USER: of.user, ITEM: of.item})
        named.to_parquet(draft / name / "0.parquet", index=False)
    (draft / CATALOGUE).write_text(found.model_dump_json(indent=1))
    of_pair = {of.user: "category", of.item: "category"}
    divided = split.Partition(by="last", key=of_pair, missing=sorted(data.missing))
    (draft / split.PARTITION).write_text(divided.model_dump_json(indent=1))
    seen = pd.concat([parts["train"], parts["validation"]]).rename(columns={USER: of.user, ITEM: of.item})
    hashes = np.unique(split.hashes(seen, list(of_pair)))
    pd.DataFrame({"hash": hashes}).to_parquet(draft / split.SEEN, index=False)
    summary = {
        "data_version": version,
        "rows": sum(len(part) for part in parts.values()),
        "users": len(found.users),
        "items": len(found.items),
        "parts": {name: {"rows": len(part), "users": part[USER].nunique()} for name, part in parts.items()},
    }
    (draft / "summary.json").write_text(json.dumps(summary, indent=1))


def leave_one_out(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The parts, of a frame with USER, ITEM, RATING and `split.TIME`.

    Of several interactions of a user with one item the last counts. Interactions of the same time (nearly
    half of the users of MovieLens rated several films in their last second) are in the order of a hash of
    user and item: an order that says something about the items, such as that of their ids, makes it easier or
    harder to tell which was the last.
    """
    hashes = pd.util.hash_pandas_object(frame[[USER, ITEM]].astype(object), index=False)
    frame = frame.assign(hash=hashes.to_numpy()).sort_values([USER, split.TIME, "hash", RATING])
    frame = frame.drop_duplicates([USER, ITEM], keep="last")
    by_user = frame.groupby(USER, sort=False)
    later, count = by_user.cumcount(ascending=False), by_user[ITEM].transform("size")
    held_out = np.where(count < FEWEST, 0, 2)
    frame[AGE] = ((later - held_out) / (count - held_out)).astype(np.float32)
    names = [USER, ITEM, RATING, AGE]
    # Users are scattered over the training part, so that each rank learns of all of them.
    train = frame[later >= held_out].sort_values("hash")
    parts = {"train": train, "validation": frame[(held_out > 0) & (later == 1)],
             "test": frame[(held_out > 0) & (later == 0)]}  # fmt: skip
    return {name: part[names].reset_index(drop=True) for name, part in parts.items()}


def fit(parts: dict[str, pd.DataFrame]) -> Catalogue:
    """Who and what there is in all parts; an item that stands only in the test part has no popularity."""
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
    of = data.interactions
    assert of
    return pa.table(
        {
            USER: pa.array(frame[of.user], pa.string()),
            ITEM: pa.array(frame[of.item], pa.string()),
            RATING: pa.array(frame[of.rating] if of.rating else np.full(len(frame), np.nan), pa.float64()),
            split.TIME: pa.array(frame[split.TIME], pa.float64()),
        }
    )
