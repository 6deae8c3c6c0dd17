"""Metrics of rankings of items, for users of whom one later item was held out.

Every item that is new to the user takes part in the ranking. Metrics on a sample of the items can order
models wrongly (Krichene and Rendle, 2020).
"""

import numpy as np


def ranks(scores: np.ndarray, seen: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """The rank of each user's held-out item among all unseen items, float64 (users,); the best rank is 1.

    `scores` (users, items). `seen` bool (users, items) marks items that do not take part. `held_out` (users,)
    is the column of the held-out item. Items with equal scores share the mean of their ranks, so that a model
    that scores all items alike gets no credit; NaN ranks below every number. Raises ValueError if a held-out
    item is seen.
    """
    rows = np.arange(len(held_out))
    if seen[rows, held_out].any():
        raise ValueError("a held-out item must not be among the seen ones")
    values = np.where(np.isnan(scores), -np.inf, scores)
    own = values[rows, held_out][:, None]
    num_better = ((values > own) & ~seen).sum(axis=1)
    num_equal = ((values == own) & ~seen).sum(axis=1)  # includes the item itself
    return num_better + (num_equal + 1) / 2


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """HR@k: the share of users whose held-out item is among the first k."""
    return float(np.mean(ranks <= k))


def ndcg(ranks: np.ndarray, k: int) -> float:
    """NDCG@k with one relevant item, whose ideal is 1: the mean of 1 / log2(1 + rank), or 0 beyond rank k."""
    return float(np.mean(np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)))


def evaluate(ranks: np.ndarray, k: int = 10) -> dict[str, float]:
    """`hr@k`, `ndcg@k`, and `mrr`, the mean of 1 / rank."""
    return {f"hr@{k}": hit_rate(ranks, k), f"ndcg@{k}": ndcg(ranks, k), "mrr": float(np.mean(1 / ranks))}
