"""The first stage of a recommender: leave one out, and the catalogue."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from app.data import split
from app.data.interactions import AGE, ITEM, RATING, USER, fit, leave_one_out
from app.errors import UserError
from tests import without_ray
from tests.unit.tasks.recommender import example


def frame(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Interactions (user, item, time) with a rating of 3."""
    return pd.DataFrame(rows, columns=[USER, ITEM, split.TIME]).assign(**{RATING: 3.0})


def test_the_last_interaction_is_test_and_the_one_before_it_validation():
    parts = leave_one_out(frame([("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("a", "w", 0)]))
    assert parts["test"][ITEM].tolist() == ["x"]
    assert parts["validation"][ITEM].tolist() == ["z"]
    train = parts["train"].set_index(ITEM)[AGE]
    assert train.to_dict() == {"w": 0.5, "y": 0.0}, "one of two training interactions came after w"


def test_users_with_fewer_than_three_interactions_are_in_the_training_part_only():
    parts = leave_one_out(frame([("a", "x", 3), ("a", "y", 1)]))
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (2, 0, 0)
    assert parts["train"].set_index(ITEM)[AGE].to_dict() == {"y": 0.5, "x": 0.0}


def test_of_several_interactions_with_an_item_the_last_counts():
    parts = leave_one_out(frame([("a", "x", 1), ("a", "y", 2), ("a", "z", 3), ("a", "x", 4)]))
    assert parts["test"][ITEM].tolist() == ["x"]
    assert sum(len(part) for part in parts.values()) == 3


def test_ties_do_not_depend_on_the_order_of_rows_nor_favour_an_id():
    rows = [(f"u{user}", f"i{item}", 0.0) for user in range(200) for item in range(4)]
    parts = leave_one_out(frame(rows))
    again = leave_one_out(frame(rows[::-1]))
    for name, part in parts.items():
        pd.testing.assert_frame_equal(part, again[name])
    assert parts["test"][ITEM].value_counts().min() > 25, "each of four about 50 times"


def test_the_catalogue_begins_with_the_most_popular_items():
    parts = leave_one_out(frame([(u, i, t) for u in "ab" for t, i in enumerate("xyz")] + [("c", "y", 0)]))
    catalogue = fit(parts)
    assert catalogue.users == ["a", "b", "c"]
    assert catalogue.items == ["y", "x", "z"]
    assert catalogue.popularity == [3, 2, 0], "held-out test items do not count"
    assert catalogue.mean == 3
    assert catalogue.user_places(["c", "new", None]).tolist() == [3, 0, 0]
    assert catalogue.item_places(["x", "new"]).tolist() == [1, -1]


def test_too_few_interactions_are_refused():
    table = pa.table({"who": ["a", "a"], "what": ["x", "y"], "stars": [1.0, 2.0], "when": [1, 2]})
    with pytest.raises(UserError, match="no user has 3 interactions or more"):
        without_ray.prepare(example.project("mf", Path()), table)


def test_the_prepared_parts_have_the_contracts_names():
    prepared = without_ray.prepare(example.project("mf", Path()), example.table())
    test = prepared.frame("test")
    assert {"who", "what"} <= set(test.columns)
    assert len(test) == example.NUM_USERS
    assert prepared.summary["parts"]["validation"] == {"rows": example.NUM_USERS, "users": example.NUM_USERS}
