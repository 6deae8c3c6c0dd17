"""How good a ranking of items is, for users of whom one later item was held out.

Every item that the user has not had takes part in the ranking: metrics over a sample of them do not even
order models rightly (Krichene and Rendle, 2020).
"""

import numpy as np


def ranks(scores: np.ndarray, seen: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """The rank of each user's held-out item among all items not seen, float64 (users,), the best is 1.

    `scores` (users, items); `seen` bool (users, items), the items that do not take part; `held_out` (users,),
    the item's column, which must not be seen. Items with the same score share the mean of their ranks, so
    that a model that finds all items alike is no good; NaN is below every number.
    """
    rows = np.arange(len(held_out))
    if seen[rows, held_out].any():
        raise ValueError("a held-out item must not be among the seen ones")
    values = np.where(np.isnan(scores), -np.inf, scores)
    own = values[rows, held_out][:, None]
    better = ((values > own) & ~seen).sum(axis=1)
    alike = ((values == own) & ~seen).sum(axis=1)  # itself included
    return better + (alike + 1) / 2


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """HR@k: the share of users whose held-out item is among the first k."""
    return float(np.mean(ranks <= k))


def ndcg(ranks: np.ndarray, k: int) -> float:
    """NDCG@k with one relevant item, so the ideal is 1: 1 / log2(1 + rank) among the first k, else 0."""
    return float(np.mean(np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)))


def evaluate(ranks: np.ndarray, k: int = 10) -> dict[str, float]:
    """`hr@k`, `ndcg@k` and `mrr`, the mean of 1 / rank."""
    return {f"hr@{k}": hit_rate(ranks, k), f"ndcg@{k}": ndcg(ranks, k), "mrr": float(np.mean(1 / ranks))}
