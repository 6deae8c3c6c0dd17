import math

import numpy as np
import pytest

from app.evaluation.ranking import evaluate, hit_rate, ndcg, ranks

NONE = np.zeros((1, 5), dtype=bool)


def rank(scores: list[float], held_out: int, seen: tuple[int, ...] = ()) -> float:
    mask = NONE[:, : len(scores)].copy()
    mask[0, list(seen)] = True
    return ranks(np.array([scores]), mask, np.array([held_out]))[0]


def test_the_best_is_first_and_the_worst_last():
    assert rank([5, 4, 3, 2, 1], 0) == 1
    assert rank([5, 4, 3, 2, 1], 4) == 5
    assert rank([5, 4, 3, 2, 1], 2) == 3


def test_seen_items_take_no_part():
    assert rank([5, 4, 3, 2, 1], 2, seen=(0,)) == 2
    assert rank([5, 4, 3, 2, 1], 2, seen=(0, 1, 4)) == 1
    assert rank([3, 3, 3, 2, 1], 2, seen=(0, 1)) == 1, "also in a tie"


def test_equal_scores_share_the_mean_of_their_ranks():
    assert rank([7, 7, 1, 0, 0], 0) == 1.5
    assert rank([9, 7, 7, 7, 0], 2) == 3
    assert rank([0, 0, 0, 0, 0], 3) == 3, "a model with equal scores ranks it in the middle"


def test_nan_ranks_below_every_number():
    assert rank([np.nan, 4, 3, 2, 1], 0) == 5
    assert rank([np.nan] * 5, 0) == 3
    assert rank([np.nan, 4, 3, 2, 1], 1) == 1
    assert rank([-np.inf, -np.inf, 3, 2, 1], 0) == 4.5


def test_every_user_has_a_ranking():
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [1, 1, 1]])
    seen = np.array([[True, False, False], [False, False, True], [False, False, False]])
    assert ranks(scores, seen, np.array([2, 1, 0])).tolist() == [2, 2, 2]


def test_a_seen_held_out_item_is_refused():
    with pytest.raises(ValueError, match="must not be among the seen"):
        rank([5, 4, 3, 2, 1], 2, seen=(2,))


def test_hit_rate_and_ndcg_by_hand():
    places = np.array([1.0, 2.0, 3.0, 11.0])
    assert hit_rate(places, 10) == 0.75
    assert hit_rate(places, 2) == 0.5
    assert hit_rate(places, 1) == 0.25
    assert ndcg(places, 10) == pytest.approx((1 + 1 / math.log2(3) + 0.5 + 0) / 4)
    assert ndcg(places, 1) == 0.25
    assert evaluate(places) == {
        "hr@10": 0.75,
        "ndcg@10": pytest.approx(0.5327, abs=1e-4),
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 11) / 4),
    }


def test_a_tie_across_rank_k_is_a_miss():
    assert hit_rate(np.array([10.0, 10.5]), 10) == 0.5


def test_random_scores_hit_k_of_n():
    random = np.random.default_rng(0)
    users, items = 4000, 100
    places = ranks(
        random.random((users, items)), np.zeros((users, items), bool), random.integers(items, size=users)
    )
    assert hit_rate(places, 10) == pytest.approx(0.1, abs=0.015)
