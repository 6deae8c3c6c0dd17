import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.config import Data, Split
from app.data.split import PARTS, TIME, assign_parts, parse_times, part_starts, row_hashes

SPLIT = Split(validation=0.1, test=0.2)
KEY = ["id", "town"]


def rows(count: int) -> pd.DataFrame:
    random = np.random.default_rng(0)
    towns = random.choice(["a", "b", "ü", None], count)
    return pd.DataFrame(
        {"id": np.arange(count) / 4, "town": towns, "bought": random.choice(["no", "yes"], count)}
    )


@pytest.mark.parametrize("split", [SPLIT, Split(validation=0.25, test=0.05), Split(validation=0.4, test=0.4)])
def test_shares_are_close_to_the_settings(split):
    part = assign_parts(rows(20_000), split, KEY)
    shares = np.bincount(part, minlength=len(PARTS)) / len(part)
    expected = [1 - split.validation - split.test, split.validation, split.test]
    np.testing.assert_allclose(shares, expected, atol=0.015)  # four standard deviations


def test_a_rows_part_does_not_depend_on_other_rows():
    frame, split = rows(1000), Split(seed=3)
    part = assign_parts(frame, split, KEY)
    order = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(assign_parts(frame.iloc[order], split, KEY), part[order])
    np.testing.assert_array_equal(assign_parts(frame[["bought", "town", "id"]], split, KEY[::-1]), part)
    chunks = [assign_parts(frame.iloc[i : i + 7], split, KEY) for i in range(0, 1000, 7)]
    np.testing.assert_array_equal(np.concatenate(chunks), part)


def test_duplicates_are_in_the_same_part():
    frame = rows(500)
    twice = pd.concat([frame, frame], ignore_index=True)
    part = assign_parts(twice.assign(bought="no"), SPLIT, KEY)
    np.testing.assert_array_equal(part[:500], part[500:])
    assert set(part) == {0, 1, 2}


@pytest.mark.parametrize("other", [1, 2, 2**31 - 1])
def test_another_seed_makes_another_split(other):
    frame = rows(1000)
    moved = (assign_parts(frame, SPLIT, KEY) != assign_parts(frame, Split(seed=other), KEY)).mean()
    assert 0.3 < moved < 0.6  # independent splits differ in 1 - (0.7^2 + 0.1^2 + 0.2^2) = 0.46 of the rows


def test_a_larger_test_part_keeps_the_rows_of_the_smaller():
    frame = rows(2000)
    small = assign_parts(frame, Split(validation=0.1, test=0.2), KEY)
    large = assign_parts(frame, Split(validation=0.1, test=0.4), KEY)
    assert (large[small == PARTS.index("test")] == PARTS.index("test")).all()


def test_parts_are_the_same_in_every_release():
    """A change would move rows between training and test part of every existing model."""
    assert assign_parts(rows(16), SPLIT, KEY).tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_no_rows_have_no_parts():
    assert assign_parts(rows(3).iloc[:0], SPLIT, KEY).shape == (0,)


BY_TIME = Split(by="time", column="day", validation=0.1, test=0.2)


def test_the_latest_rows_are_the_test_part():
    day = np.random.default_rng(0).permutation(1000).astype(float)
    part = assign_parts(pd.DataFrame({TIME: day}), BY_TIME, [], part_starts(day, np.ones(1000), BY_TIME))
    assert np.bincount(part).tolist() == [700, 100, 200]
    assert day[part == 0].max() < day[part == 1].min()
    assert day[part == 1].max() < day[part == 2].min()


def test_rows_of_the_same_time_are_in_the_same_part():
    # 65 rows of time 1, then 10, 15 and 10: the 70th and the 80th row have times 2 and 3.
    assert part_starts(np.array([3.0, 1.0, 4.0, 2.0]), np.array([15, 65, 10, 10]), BY_TIME) == (3.0, 4.0)


def test_a_part_may_be_empty():
    assert part_starts(np.array([1.0, 2.0]), np.array([95, 5]), BY_TIME) == (2.0, 2.0)
    assert part_starts(np.array([1.0]), np.array([5]), BY_TIME) == (np.inf, np.inf)


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
def test_times_of_every_type(column):
    first, second, missing = parse_times(pa.chunked_array([column]))
    assert 0 == first < second
    assert missing is None


def test_text_that_is_not_a_time_is_unchanged():
    assert parse_times(pa.chunked_array([["1970-01-01", "soon"]])).tolist() == [0, "soon"]


# Folds


def fold(split: Split, i: int, k: int) -> Split:
    return Split(**{**split.model_dump(), "fold": (i, k)})


def test_each_row_outside_the_test_part_is_validated_in_one_fold():
    frame = rows(5000)
    whole = assign_parts(frame, SPLIT, KEY)
    parts = np.stack([assign_parts(frame, fold(SPLIT, i, 4), KEY) for i in range(4)])
    np.testing.assert_array_equal(parts == 2, np.broadcast_to(whole == 2, parts.shape))
    np.testing.assert_array_equal((parts == 1).sum(axis=0), whole != 2)
    np.testing.assert_allclose((parts == 1).mean(axis=1), 0.2, atol=0.02)


def test_a_fold_by_time_validates_on_rows_after_its_training_rows():
    day = np.random.default_rng(0).permutation(1000).astype(float)
    for i in range(3):
        split = fold(BY_TIME, i, 3)
        part = assign_parts(pd.DataFrame({TIME: day}), split, [], part_starts(day, np.ones(1000), split))
        counts = {p: int((part == p).sum()) for p in (0, 1, -1, 2)}
        assert counts == {0: 500 + 100 * i, 1: 100, -1: 200 - 100 * i, 2: 200}
        assert day[part == 0].max() < day[part == 1].min()
        assert day[part == 1].max() < day[part == 2].min()


@pytest.mark.parametrize("impossible", [(3, 3), (-1, 3), (0, 1)])
def test_an_impossible_fold_is_refused(impossible):
    with pytest.raises(ValueError, match="fold must be"):
        Split(fold=impossible)


def test_folds_that_leave_no_training_rows_are_refused():
    with pytest.raises(ValueError, match="nothing before the first"):
        fold(BY_TIME, 0, 8)


# The key


def test_a_rows_part_depends_on_the_key_alone():
    frame = rows(1000)
    part = assign_parts(frame, SPLIT, KEY)
    more = frame.assign(new=np.random.default_rng(0).random(1000), bought="yes")
    np.testing.assert_array_equal(assign_parts(more, SPLIT, KEY), part)


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_a_row_has_the_same_hash_in_every_format(file_format):
    frame = rows(200)
    frame.loc[::7, "id"] = np.nan
    frame.loc[1, "id"] = -0.0
    file = io.BytesIO()
    if file_format == "parquet":
        frame.to_parquet(file)
        stored = pd.read_parquet(io.BytesIO(file.getvalue()))
    else:
        stored = pd.read_csv(io.StringIO(frame.to_csv(index=False)), keep_default_na=False, na_values=[""])
        stored.loc[1, "id"] = 0.0
    np.testing.assert_array_equal(row_hashes(stored, KEY), row_hashes(frame, KEY))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"key": ["gone"]}, "split.key: no column 'gone'; data.columns has town"),
        ({"key": ["town", "town"]}, "key: columns must be distinct"),
        ({"key": ["town"], "by": "time", "column": "day"}, "key: must be left out with by: time"),
    ],
)
def test_an_impossible_key_is_refused(split, message):
    with pytest.raises(ValueError, match=message):
        Data.model_validate(
            {
                "source": {"path": "unused"},
                "label": {"column": "bought", "positive": "yes"},
                "columns": {"town": {"type": "category"}},
                "split": split,
            }
        )
