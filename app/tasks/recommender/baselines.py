"""Recommenders without any training by gradient, to hold a trained one against.

Each takes `interactions`, a sparse matrix (users, items) with a 1 where the user had the item, and gives
scores (users, items), float64.
"""

import numpy as np
from scipy import sparse


def popularity(interactions: sparse.csr_matrix) -> np.ndarray:
    """The number of users who had the item: the same for everyone."""
    counts = np.asarray(interactions.sum(axis=0), dtype=np.float64)
    return np.repeat(counts, interactions.shape[0], axis=0)


def item_knn(interactions: sparse.csr_matrix, neighbours: int = 100) -> np.ndarray:
    """The sum of cosines to the user's items, over each item's nearest `neighbours` (Sarwar et al., 2001)."""
    together = (interactions.T @ interactions).toarray().astype(np.float64)
    norm = np.sqrt(np.maximum(together.diagonal(), 1))
    cosine = together / np.outer(norm, norm)
    np.fill_diagonal(cosine, 0)
    if neighbours < len(cosine):
        least = np.partition(cosine, -neighbours, axis=0)[-neighbours]
        cosine[cosine < least] = 0
    return np.asarray(interactions @ cosine)


def ease(interactions: sparse.csr_matrix, penalty: float) -> np.ndarray:
    """EASE (Steck, 2019): the ridge regression of every item on all others, in closed form.

    `penalty` is the ridge's. Takes the cube of the number of items in time.
    """
    gram = (interactions.T @ interactions).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    inverse = np.linalg.inv(gram)
    weights = -inverse / inverse.diagonal()
    np.fill_diagonal(weights, 0)
    return np.asarray(interactions @ weights)
