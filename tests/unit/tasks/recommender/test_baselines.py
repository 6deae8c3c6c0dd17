import json

import numpy as np
import pytest
from scipy import sparse

from app.tasks.recommender.baselines import ease, item_knn, popularity

HAD = sparse.csr_matrix(np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0]], dtype=np.float64))
"""Three users and four items; no user has the last item."""


def test_popularity_counts_users():
    assert popularity(HAD).tolist() == [[3, 2, 2, 0]] * 3


def test_item_knn_by_hand():
    cosine = 2 / np.sqrt(6)  # of item 0 with 1 and with 2: two users of three and two
    scores = item_knn(HAD)
    assert scores[0] == pytest.approx([cosine, cosine, cosine + 0.5, 0])
    assert scores[2] == pytest.approx([cosine, cosine + 0.5, cosine, 0])


def test_item_knn_uses_only_the_nearest_neighbours():
    scores = item_knn(HAD, neighbours=1)
    assert scores[0] == pytest.approx([2 / np.sqrt(6), 2 / np.sqrt(6), 2 / np.sqrt(6), 0])


@pytest.mark.parametrize("penalty", [0.5, 10.0])
def test_ease_is_the_ridge_regression_of_each_item_on_the_others(penalty):
    had = HAD.toarray()
    scores = ease(HAD, penalty)
    for item in range(had.shape[1]):
        others = np.delete(had, item, axis=1)
        ridge = np.linalg.solve(others.T @ others + penalty * np.eye(3), others.T @ had[:, item])
        assert scores[:, item] == pytest.approx(others @ ridge)


def test_ease_learns_the_two_kinds_of_users_and_popularity_does_not(build):
    evaluation = json.loads((build("recommender", "mf").bundle.path / "metrics.json").read_text())
    assert evaluation["baselines"]["ease"]["hr@10"] > 0.75
    assert evaluation["baselines"]["popularity"]["hr@10"] < 0.75
