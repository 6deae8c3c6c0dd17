"""The rows from which a model may have learned."""

import numpy as np
import pandas as pd
import pytest

from app.config import Data, Split
from app.data.partition import SEEN_FILE, Partition, partition_of, read_partition, with_partition_key
from app.data.split import TIME, assign_parts, part_starts, row_hashes

KEY = ["id", "town"]
NUMBERS = {"id": "number"}
BY_TIME = Split(by="time", column="day", validation=0.1, test=0.2)


def rows(count: int) -> pd.DataFrame:
    random = np.random.default_rng(0)
    return pd.DataFrame({"id": np.arange(count) / 4, "town": random.choice(["a", "b", "ü", None], count)})


def data(*columns: str, types: dict[str, str] | None = None, **settings) -> Data:
    return Data.model_validate(
        {
            "source": {"path": "unused"},
            "label": {"column": "bought", "positive": "yes"},
            "columns": {name: {"type": (types or {}).get(name, "category")} for name in columns},
            **settings,
        }
    )


def test_only_rows_of_the_test_part_are_unseen(tmp_path):
    frame = rows(5000)
    by_content = data("id", "town", types=NUMBERS)
    unseen = partition_of(by_content, None).unseen(frame, tmp_path)
    np.testing.assert_array_equal(unseen, assign_parts(frame, by_content.split, by_content.split_key) == 2)
    frame[TIME] = np.random.default_rng(0).permutation(5000).astype(float)
    by_time = data("town", split=BY_TIME.model_dump())
    starts = part_starts(frame[TIME].to_numpy(), np.ones(5000), by_time.split)
    unseen = partition_of(by_time, starts).unseen(frame, tmp_path)
    np.testing.assert_array_equal(unseen, assign_parts(frame, by_time.split, [], starts) == 2)
    assert unseen.sum() == 1000


def test_a_larger_test_part_has_the_unseen_rows_of_the_smaller(tmp_path):
    frame = rows(5000)
    is_large_test = assign_parts(frame, Split(test=0.4), KEY) == 2
    unseen = partition_of(data("id", "town", types=NUMBERS), None).unseen(frame[is_large_test], tmp_path)
    assert unseen.mean() == pytest.approx(0.5, abs=0.05)


def test_interactions_are_unseen_unless_they_are_listed(tmp_path):
    frame = pd.DataFrame({"who": ["a", "a", "b"], "what": ["x", "y", "x"]})
    pd.DataFrame({"hash": row_hashes(frame[1:], ["who", "what"])}).to_parquet(tmp_path / SEEN_FILE)
    partition = Partition(by="last", key={"who": "category", "what": "category"})
    assert partition.unseen(frame, tmp_path).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("current", "reason"),
    [
        (data("id", "town", "new", types=NUMBERS), ""),
        (data("id", "town", types=NUMBERS, split={"seed": 3, "test": 0.5, "key": ["id"]}), ""),
        (data("id", "town", types=NUMBERS, split=BY_TIME.model_dump()), ""),
        (data("town"), "its split is by 'id', which is no longer in data.columns"),
        (data("id", "town"), "its split is by 'id' as a number, which is now a category"),
        (data("id", "town", types=NUMBERS, missing=["?"]), "values for which data.missing was [], not ['?']"),
    ],
)
def test_an_obstacle_is_named(current, reason):
    obstacle = partition_of(data("id", "town", types=NUMBERS), None).obstacle(current)
    assert obstacle.endswith(reason)
    assert bool(obstacle) == bool(reason)


def test_a_split_by_time_needs_its_time_column():
    partition = partition_of(data("town", split=BY_TIME.model_dump()), (1.0, 2.0))
    assert partition.obstacle(data("town")) == "its split is by the time in 'day', and data.split is not"
    assert not partition.obstacle(data("town", "new", split={**BY_TIME.model_dump(), "test": 0.4}))


def test_the_key_of_the_champion_stays_when_columns_are_added():
    partition = partition_of(data("id", "town", types=NUMBERS), None)
    more = data("new", "town", "id", types=NUMBERS)
    assert with_partition_key(more, partition).split_key == KEY
    assert with_partition_key(more, None) is more
    for unchanged in (
        data("new", "town", "id", types=NUMBERS, split={"key": ["new"]}),  # the project file decides
        data("new", "town"),  # a column of the key is gone
        data("id", "town", types=NUMBERS),  # the key is the same anyway
        data("id", "town", "new", types=NUMBERS, split=BY_TIME.model_dump()),
    ):
        assert with_partition_key(unchanged, partition) is unchanged


def test_a_partition_is_read_as_it_was_written(tmp_path):
    assert read_partition(tmp_path) is None
    partition = partition_of(data("id", "town", types=NUMBERS), None)
    (tmp_path / "split.json").write_text(partition.model_dump_json())
    assert read_partition(tmp_path) == partition
