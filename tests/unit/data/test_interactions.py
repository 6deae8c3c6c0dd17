"""The split of interactions and the catalogue, without Ray."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.config import Data
from app.data import interactions, split
from app.data.interactions import AGE, ITEM, RATING, USER, fit_catalogue, leave_one_out, read_catalogue
from app.data.partition import SEEN_FILE, read_partition
from app.errors import UserError
from tests.without_ray import Rows

DATA = Data.model_validate(
    {
        "source": {"path": "unused.parquet"},
        "interactions": {"user": "who", "item": "what", "time": "when", "rating": "stars"},
        "columns": {
            "who": {"type": "category"},
            "what": {"type": "category"},
            "stars": {"type": "number", "min": 1, "max": 5},
        },
    }
)


def frame(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Interactions (user, item, time), all with the rating 3."""
    return pd.DataFrame(rows, columns=[USER, ITEM, split.TIME]).assign(**{RATING: 3.0})


def test_the_last_interaction_is_test_and_the_one_before_it_validation():
    parts = leave_one_out(frame([("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("a", "w", 0)]))
    assert parts["test"][ITEM].tolist() == ["x"]
    assert parts["validation"][ITEM].tolist() == ["z"]
    train = parts["train"].set_index(ITEM)[AGE]
    assert train.to_dict() == {"w": 0.5, "y": 0.0}, "one of two came later than w"


def test_a_user_with_fewer_than_three_interactions_is_only_in_the_training_part():
    parts = leave_one_out(frame([("a", "x", 3), ("a", "y", 1)]))
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (2, 0, 0)
    assert parts["train"].set_index(ITEM)[AGE].to_dict() == {"y": 0.5, "x": 0.0}


def test_the_last_of_several_interactions_with_an_item_counts():
    parts = leave_one_out(frame([("a", "x", 1), ("a", "y", 2), ("a", "z", 3), ("a", "x", 4)]))
    assert parts["test"][ITEM].tolist() == ["x"]
    assert sum(len(part) for part in parts.values()) == 3


def test_ties_depend_neither_on_the_order_of_rows_nor_on_ids():
    rows = [(f"u{user}", f"i{item}", 0.0) for user in range(200) for item in range(4)]
    parts = leave_one_out(frame(rows))
    reversed_parts = leave_one_out(frame(rows[::-1]))
    for name, part in parts.items():
        pd.testing.assert_frame_equal(part, reversed_parts[name])
    assert parts["test"][ITEM].value_counts().min() > 25, "about 50 times for each of four items"


def test_the_catalogue_starts_with_the_most_popular_item():
    parts = leave_one_out(frame([(u, i, t) for u in "ab" for t, i in enumerate("xyz")] + [("c", "y", 0)]))
    catalogue = fit_catalogue(parts)
    assert catalogue.users == ["a", "b", "c"]
    assert catalogue.items == ["y", "x", "z"]
    assert catalogue.popularity == [3, 2, 0], "the test part does not count"
    assert catalogue.mean == 3
    assert catalogue.user_indices(["c", "new", None]).tolist() == [3, 0, 0]
    assert catalogue.item_indices(["x", "new"]).tolist() == [1, -1]


def test_data_without_a_user_to_hold_out_are_refused(tmp_path):
    table = pa.table({"who": ["a", "a"], "what": ["x", "y"], "stars": [1.0, 2.0], "when": [1, 2]})
    with pytest.raises(UserError, match="one user must have 3 interactions or more"):
        interactions.build(Rows(table), DATA, "v", tmp_path)


def test_build_writes_parts_catalogue_partition_and_summary(tmp_path):
    times = {"who": list("aaab"), "what": list("xyzx"), "stars": [1.0, 2.0, 3.0, 4.0], "when": [1, 2, 3, 1]}
    interactions.build(Rows(pa.table(times)), DATA, "version", tmp_path)
    test = pd.read_parquet(tmp_path / "test")
    assert test[["who", "what"]].to_numpy().tolist() == [["a", "z"]]
    assert read_catalogue(tmp_path).items == ["x", "y", "z"]
    partition = read_partition(tmp_path)
    assert partition is not None
    assert partition.by == "last"
    assert partition.unseen(test, tmp_path).tolist() == [True]
    assert not partition.unseen(pd.read_parquet(tmp_path / "train"), tmp_path).any()
    assert len(np.unique(pd.read_parquet(tmp_path / SEEN_FILE)["hash"])) == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rows"], summary["users"], summary["items"]) == (4, 2, 3)
    assert summary["parts"]["train"] == {"rows": 2, "users": 2}
