import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.config import Split
from app.data.split import PARTS, TIME, assign, starts, times

SPLIT = Split(validation=0.1, test=0.2)


def rows(count: int) -> pd.DataFrame:
    random = np.random.default_rng(0)
    towns = random.choice(["a", "b", "ü", None], count)
    return pd.DataFrame(
        {"id": np.arange(count) / 4, "town": towns, "bought": random.choice(["no", "yes"], count)}
    )


@pytest.mark.parametrize("split", [SPLIT, Split(validation=0.25, test=0.05), Split(validation=0.4, test=0.4)])
def test_shares_are_near_the_settings(split):
    part = assign(rows(20_000), split, seed=0)
    shares = np.bincount(part, minlength=len(PARTS)) / len(part)
    expected = [1 - split.validation - split.test, split.validation, split.test]
    np.testing.assert_allclose(shares, expected, atol=0.015)  # four standard deviations


def test_a_row_keeps_its_part_whatever_stands_around_it():
    frame = rows(1000)
    part = assign(frame, SPLIT, seed=3)
    order = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(assign(frame.iloc[order], SPLIT, seed=3), part[order])
    np.testing.assert_array_equal(assign(frame[["bought", "town", "id"]], SPLIT, seed=3), part)
    chunks = [assign(frame.iloc[i : i + 7], SPLIT, seed=3) for i in range(0, 1000, 7)]
    np.testing.assert_array_equal(np.concatenate(chunks), part)


def test_duplicates_stay_together():
    frame = rows(500)
    twice = pd.concat([frame, frame], ignore_index=True)
    part = assign(twice, SPLIT, seed=0)
    np.testing.assert_array_equal(part[:500], part[500:])
    assert set(part) == {0, 1, 2}


@pytest.mark.parametrize("other", [1, 2, 2**31 - 1])
def test_another_seed_is_another_split(other):
    frame = rows(1000)
    moved = (assign(frame, SPLIT, seed=0) != assign(frame, SPLIT, seed=other)).mean()
    assert 0.3 < moved < 0.6  # independent splits differ in 1 - (0.7^2 + 0.1^2 + 0.2^2) = 0.46 of the rows


def test_a_larger_test_part_keeps_the_rows_of_the_smaller():
    frame = rows(2000)
    small = assign(frame, Split(validation=0.1, test=0.2), seed=0)
    large = assign(frame, Split(validation=0.1, test=0.4), seed=0)
    assert (large[small == PARTS.index("test")] == PARTS.index("test")).all()


def test_known_answer():
    """A change here moves rows between training and test of every model there is."""
    assert assign(rows(16), SPLIT, seed=1).tolist() == [2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 1, 0, 2, 0, 2]


def test_no_rows_have_no_parts():
    assert assign(rows(3).iloc[:0], SPLIT, seed=0).shape == (0,)


BY_TIME = Split(by="time", column="day", validation=0.1, test=0.2)


def test_by_time_the_last_rows_are_the_test_part():
    day = np.random.default_rng(0).permutation(1000).astype(float)
    part = assign(pd.DataFrame({TIME: day}), BY_TIME, 0, starts(day, np.ones(1000), BY_TIME))
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
    whole = assign(frame, SPLIT, seed=2)
    parts = np.stack([assign(frame, fold(SPLIT, i, 4), seed=2) for i in range(4)])
    np.testing.assert_array_equal(parts == 2, np.broadcast_to(whole == 2, parts.shape))
    np.testing.assert_array_equal((parts == 1).sum(axis=0), whole != 2)
    np.testing.assert_allclose((parts == 1).mean(axis=1), 0.2, atol=0.02)


def test_by_time_a_fold_lies_after_what_it_trains_on_and_nothing_later_is_seen():
    day = np.random.default_rng(0).permutation(1000).astype(float)
    for i in range(3):
        split = fold(BY_TIME, i, 3)
        part = assign(pd.DataFrame({TIME: day}), split, 0, starts(day, np.ones(1000), split))
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
