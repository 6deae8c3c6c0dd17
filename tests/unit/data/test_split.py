import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.config import Data, Split
from app.data.split import PARTS, SEEN, TIME, Partition, assign, carried, hashes, partition, starts, times

SPLIT = Split(validation=0.1, test=0.2)
KEY = ["id", "town"]


def rows(count: int) -> pd.DataFrame:
    random = np.random.default_rng(0)
    towns = random.choice(["a", "b", "ü", None], count)
    return pd.DataFrame(
        {"id": np.arange(count) / 4, "town": towns, "bought": random.choice(["no", "yes"], count)}
    )


@pytest.mark.parametrize("split", [SPLIT, Split(validation=0.25, test=0.05), Split(validation=0.4, test=0.4)])
def test_shares_are_near_the_settings(split):
    part = assign(rows(20_000), split, KEY)
    shares = np.bincount(part, minlength=len(PARTS)) / len(part)
    expected = [1 - split.validation - split.test, split.validation, split.test]
    np.testing.assert_allclose(shares, expected, atol=0.015)  # four standard deviations


def test_a_row_keeps_its_part_whatever_stands_around_it():
    frame, split = rows(1000), Split(seed=3)
    part = assign(frame, split, KEY)
    order = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(assign(frame.iloc[order], split, KEY), part[order])
    np.testing.assert_array_equal(assign(frame[["bought", "town", "id"]], split, KEY[::-1]), part)
    chunks = [assign(frame.iloc[i : i + 7], split, KEY) for i in range(0, 1000, 7)]
    np.testing.assert_array_equal(np.concatenate(chunks), part)


def test_duplicates_stay_together():
    frame = rows(500)
    twice = pd.concat([frame, frame], ignore_index=True)
    part = assign(twice.assign(bought="no"), SPLIT, KEY)
    np.testing.assert_array_equal(part[:500], part[500:])
    assert set(part) == {0, 1, 2}


@pytest.mark.parametrize("other", [1, 2, 2**31 - 1])
def test_another_seed_is_another_split(other):
    frame = rows(1000)
    moved = (assign(frame, SPLIT, KEY) != assign(frame, Split(seed=other), KEY)).mean()
    assert 0.3 < moved < 0.6  # independent splits differ in 1 - (0.7^2 + 0.1^2 + 0.2^2) = 0.46 of the rows


def test_a_larger_test_part_keeps_the_rows_of_the_smaller():
    frame = rows(2000)
    small = assign(frame, Split(validation=0.1, test=0.2), KEY)
    large = assign(frame, Split(validation=0.1, test=0.4), KEY)
    assert (large[small == PARTS.index("test")] == PARTS.index("test")).all()


def test_known_answer():
    """A change here moves rows between training and test of every model there is."""
    assert assign(rows(16), SPLIT, KEY).tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_no_rows_have_no_parts():
    assert assign(rows(3).iloc[:0], SPLIT, KEY).shape == (0,)


BY_TIME = Split(by="time", column="day", validation=0.1, test=0.2)


def test_by_time_the_last_rows_are_the_test_part():
    day = np.random.default_rng(0).permutation(1000).astype(float)
    part = assign(pd.DataFrame({TIME: day}), BY_TIME, [], starts(day, np.ones(1000), BY_TIME))
    assert np.bincount(part).tolist() == [700, 100, 200]
    assert day[part == 0].max() < day[part == 1].min()
    assert day[part == 1].max() < day[part == 2].min()


def test_rows_of_the_same_time_stay_together():
    # 65 rows of time 1, then 10, 15 and 10: 70 and 80 rows lie within those of time 2 and 3.
    assert starts(np.array([3.0, 1.0, 4.0, 2.0]), np.array([15, 65, 10, 10]), BY_TIME) == (3.0, 4.0)


def test_a_part_may_be_empty():
    assert starts(np.array([1.0, 2.0]), np.array([95, 5]), BY_TIME) == (2.0, 2.0)
    assert starts(np.array([1.0]), np.array([5]), BY_TIME) == (np.inf, np.inf)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 86_400_000, None], pa.timestamp("ms", "UTC")),
        pa.array([0, 1, None], pa.date32()),
        pa.array(["1970-01-01", "1970-01-02T00:00:00", None]),
        pa.array(["1970-01-01T00:00:00Z", "1970-01-02T01:00:00+01:00", ""]),
        pa.array(["0", "86400.0", ""]),
        pa.array([0, 86400, None]),
        pa.array([0.0, 86400.0, float("nan")]),
        pa.array(["0", "86400", None]).dictionary_encode(),
    ],
    ids=str,
)
def test_times_of_many_types(column):
    first, second, missing = times(pa.chunked_array([column]))
    assert 0 == first < second
    assert missing is None


def test_text_that_is_no_time_stays():
    assert times(pa.chunked_array([["1970-01-01", "soon"]])).tolist() == [0, "soon"]


# Folds


def fold(split: Split, i: int, k: int) -> Split:
    return Split(**{**split.model_dump(), "fold": (i, k)})


def test_each_row_but_the_test_parts_is_validated_on_in_one_fold():
    frame = rows(5000)
    whole = assign(frame, SPLIT, KEY)
    parts = np.stack([assign(frame, fold(SPLIT, i, 4), KEY) for i in range(4)])
    np.testing.assert_array_equal(parts == 2, np.broadcast_to(whole == 2, parts.shape))
    np.testing.assert_array_equal((parts == 1).sum(axis=0), whole != 2)
    np.testing.assert_allclose((parts == 1).mean(axis=1), 0.2, atol=0.02)


def test_by_time_a_fold_lies_after_what_it_trains_on_and_nothing_later_is_seen():
    day = np.random.default_rng(0).permutation(1000).astype(float)
    for i in range(3):
        split = fold(BY_TIME, i, 3)
        part = assign(pd.DataFrame({TIME: day}), split, [], starts(day, np.ones(1000), split))
        counts = {p: int((part == p).sum()) for p in (0, 1, -1, 2)}
        assert counts == {0: 500 + 100 * i, 1: 100, -1: 200 - 100 * i, 2: 200}
        assert day[part == 0].max() < day[part == 1].min()
        assert day[part == 1].max() < day[part == 2].min()


@pytest.mark.parametrize("wrong", [(3, 3), (-1, 3), (0, 1)])
def test_a_fold_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="fold must be"):
        Split(fold=wrong)


def test_more_folds_than_there_is_time_are_refused():
    with pytest.raises(ValueError, match="nothing before the first"):
        fold(BY_TIME, 0, 8)


# What a model may have learnt from


def data(*columns: str, types: dict[str, str] | None = None, **settings) -> Data:
    contract = {name: {"type": (types or {}).get(name, "category")} for name in columns}
    return Data.model_validate(
        {
            "source": {"path": "unused"},
            "label": {"column": "bought", "positive": "yes"},
            "columns": contract,
            **settings,
        }
    )


NUMBERS = {"id": "number"}


def test_a_rows_part_depends_on_the_key_alone():
    frame = rows(1000)
    part = assign(frame, SPLIT, KEY)
    more = frame.assign(new=np.random.default_rng(0).random(1000), bought="yes")
    np.testing.assert_array_equal(assign(more, SPLIT, KEY), part)


@pytest.mark.parametrize("write", ["parquet", "csv"])
def test_a_row_has_the_same_hash_wherever_it_was_read_from(write):
    frame = rows(200)
    frame.loc[::7, "id"] = np.nan
    frame.loc[1, "id"] = -0.0
    file = io.BytesIO()
    if write == "parquet":
        frame.to_parquet(file)
        again = pd.read_parquet(io.BytesIO(file.getvalue()))
    else:
        again = pd.read_csv(io.StringIO(frame.to_csv(index=False)), keep_default_na=False, na_values=[""])
        again.loc[1, "id"] = 0.0
    np.testing.assert_array_equal(hashes(again, KEY), hashes(frame, KEY))


def test_the_rows_of_the_test_part_are_unseen_and_no_others(tmp_path):
    frame = rows(5000)
    by_content = data("id", "town", types=NUMBERS)
    unseen = partition(by_content, None).unseen(frame, tmp_path)
    np.testing.assert_array_equal(unseen, assign(frame, by_content.split, by_content.split_key) == 2)
    frame[TIME] = np.random.default_rng(0).permutation(5000).astype(float)
    by_time = data("town", split=BY_TIME.model_dump())
    begin = starts(frame[TIME].to_numpy(), np.ones(5000), by_time.split)
    unseen = partition(by_time, begin).unseen(frame, tmp_path)
    np.testing.assert_array_equal(unseen, assign(frame, by_time.split, [], begin) == 2)
    assert unseen.sum() == 1000


def test_of_a_larger_test_part_the_rows_of_the_smaller_are_unseen(tmp_path):
    frame = rows(5000)
    large = assign(frame, Split(test=0.4), KEY) == 2
    unseen = partition(data("id", "town", types=NUMBERS), None).unseen(frame[large], tmp_path)
    assert unseen.mean() == pytest.approx(0.5, abs=0.05)


def test_interactions_are_unseen_unless_they_are_listed(tmp_path):
    frame = pd.DataFrame({"who": ["a", "a", "b"], "what": ["x", "y", "x"]})
    pd.DataFrame({"hash": hashes(frame[1:], ["who", "what"])}).to_parquet(tmp_path / SEEN)
    left_one_out = Partition(by="last", key={"who": "category", "what": "category"})
    assert left_one_out.unseen(frame, tmp_path).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (data("id", "town", "new", types=NUMBERS), ""),
        (data("id", "town", types=NUMBERS, split={"seed": 3, "test": 0.5, "key": ["id"]}), ""),
        (data("id", "town", types=NUMBERS, split=BY_TIME.model_dump()), ""),
        (data("town"), "its split goes by 'id', which is no longer in data.columns"),
        (data("id", "town"), "its split goes by 'id' as a number, which is now a category"),
        (data("id", "town", types=NUMBERS, missing=["?"]), "values for which data.missing was [], not ['?']"),
    ],
)
def test_says_why_rows_cannot_be_told_apart(now, reason):
    found = partition(data("id", "town", types=NUMBERS), None).obstacle(now)
    assert found.endswith(reason)
    assert bool(found) == bool(reason)


def test_a_split_by_time_says_nothing_of_rows_without_it():
    before = partition(data("town", split=BY_TIME.model_dump()), (1.0, 2.0))
    assert before.obstacle(data("town")) == "its split goes by the time in 'day', and data.split does not"
    assert not before.obstacle(data("town", "new", split={**BY_TIME.model_dump(), "test": 0.4}))


def test_the_key_of_the_champion_stays_when_columns_are_added():
    before = partition(data("id", "town", types=NUMBERS), None)
    more = data("new", "town", "id", types=NUMBERS)
    assert carried(more, before).split_key == KEY
    assert carried(more, None) is more
    for other in (
        data("new", "town", "id", types=NUMBERS, split={"key": ["new"]}),  # the file decides
        data("new", "town"),  # no longer possible
        data("id", "town", types=NUMBERS),  # the same anyway
        data("id", "town", "new", types=NUMBERS, split=BY_TIME.model_dump()),
    ):
        assert carried(other, before) is other


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"key": ["gone"]}, "split.key: no column 'gone'; data.columns has town"),
        ({"key": ["town", "town"]}, "key: columns must be distinct"),
        ({"key": ["town"], "by": "time", "column": "day"}, "key: must be left out with by: time"),
    ],
)
def test_an_impossible_key_is_refused(split, says):
    with pytest.raises(ValueError, match=says):
        data("town", split=split)
