import numpy as np
import pandas as pd
import pytest

from app.config import Split
from app.data.split import PARTS, assign

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
