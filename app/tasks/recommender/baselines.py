"""The baselines of a recommender: popularity, nearest items and EASE, all without gradient descent.

Each takes `interactions`, a sparse matrix (users, items) with 1 where the user has had the item, and returns
scores, float64 (users, items).
"""

import functools
from collections.abc import Callable

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits
from torch import Tensor

from app.data.interactions import ITEM, USER
from app.evaluation import ranking
from app.tasks.recommender.task import Task

EASE_PENALTIES = (50.0, 100.0, 200.0, 400.0, 800.0)
"""Penalties of EASE, from which the validation part chooses."""

Baseline = Callable[[sparse.csr_matrix], np.ndarray]


def baselines(task: Task) -> dict[str, dict[str, float]]:
    """See `app.tasks.baselines_of`. Fits them on the training and validation parts."""

    def metrics(part: str, seen: Tensor, baseline: Baseline) -> dict[str, float]:
        frame = task.frame(part)
        users, items = task.catalogue.user_indices(frame[USER]), task.catalogue.item_indices(frame[ITEM])
        scores = baseline(sparse.csr_matrix(seen.numpy(), dtype=np.float64))
        return ranking.evaluate(ranking.ranks(scores[users], seen.numpy()[users], items))

    train, seen = task.seen_in("train"), task.seen_in("train", "validation")
    eases: list[Baseline] = [functools.partial(ease, penalty=penalty) for penalty in EASE_PENALTIES]
    # BLAS's threads spin while they wait for each other: on busy cores that takes longer than the arithmetic.
    with threadpool_limits(1):
        fitted: dict[str, Baseline] = {
            "popularity": popularity,
            "item_knn": item_knn,
            "ease": max(eases, key=lambda ease: metrics("validation", train, ease)["hr@10"]),
        }
        return {name: metrics("test", seen, baseline) for name, baseline in fitted.items()}


def popularity(interactions: sparse.csr_matrix) -> np.ndarray:
    """The number of users who have had the item: the same scores for every user."""
    counts = np.asarray(interactions.sum(axis=0), dtype=np.float64)
    return np.repeat(counts, interactions.shape[0], axis=0)


def item_knn(interactions: sparse.csr_matrix, neighbours: int = 100) -> np.ndarray:
    """Item-based nearest neighbours (Sarwar et al., 2001): the sum of the item's cosine similarities to those
    of the user's items that are among its nearest `neighbours`."""
    together = (interactions.T @ interactions).toarray().astype(np.float64)
    norm = np.sqrt(np.maximum(together.diagonal(), 1))
    cosine = together / np.outer(norm, norm)
    np.fill_diagonal(cosine, 0)
    if neighbours < len(cosine):
        threshold = np.partition(cosine, -neighbours, axis=0)[-neighbours]
        cosine[cosine < threshold] = 0
    return np.asarray(interactions @ cosine)


def ease(interactions: sparse.csr_matrix, penalty: float) -> np.ndarray:
    """EASE (Steck, 2019): the ridge regression of every item on all others, in closed form.

    `penalty` is the weight of the squared norm in the regression. The time grows with the cube of the number
    of items.
    """
    gram = (interactions.T @ interactions).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    inverse = np.linalg.inv(gram)
    weights = -inverse / inverse.diagonal()
    np.fill_diagonal(weights, 0)
    return np.asarray(interactions @ weights)
