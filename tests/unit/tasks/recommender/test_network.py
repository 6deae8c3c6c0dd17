import math
from pathlib import Path

import numpy as np
import pytest
import torch

from app.tasks.recommender.network import bpr, recommender, softmax
from tests.unit.tasks.recommender import example


@pytest.mark.parametrize("kind", ["mf", "ncf"])
def test_pairs_and_all_items_have_the_same_scores(kind):
    network = recommender(example.project(kind, Path()).model, 5, 7, 2.5).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        users, items = torch.tensor([1, 4, 0]), torch.tensor([6, 0, 2])
        every = network(users)
        assert every.shape == (3, 7)
        torch.testing.assert_close(network.score_pairs(users, items), every.gather(1, items[:, None])[:, 0])


def test_matrix_factorization_by_hand():
    network = recommender(example.project("mf", Path()).model, 3, 2, 0.5).eval()
    with torch.no_grad():
        network.user.weight[1] = 2.0
        network.item.weight[1] = 3.0
        network.item_bias.weight[1] = 0.25
    assert network(torch.tensor([1]))[0, 1].item() == pytest.approx(8 * 2 * 3 + 0.25 + 0.5)
    assert network(torch.tensor([0]))[0, 1].item() == pytest.approx(0.75), "user 0 has the zero vector"


def test_with_all_items_as_negatives_softmax_is_the_log_likelihood():
    scores = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    allowed = torch.tensor([[False, True, False, True]])  # 0 is the row's own, 2 was had too
    got = softmax(scores[:, 0], scores, allowed, num_items=4)
    own, others = math.exp(1), math.exp(2) + math.exp(-1)
    assert got.item() == pytest.approx(-math.log(own / (own + others)), rel=1e-5)


def test_a_sample_of_negatives_represents_all_items():
    items = torch.zeros(1, 10)
    allowed = torch.ones(1, 10, dtype=torch.bool)
    whole = softmax(torch.zeros(1), items, allowed, num_items=10)
    sample = softmax(torch.zeros(1), items[:, :5], allowed[:, :5], num_items=10)
    torch.testing.assert_close(whole, sample)


def test_bpr_by_hand():
    others, allowed = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    pairs = [math.log1p(math.exp(1 - 2)), math.log1p(math.exp(3 - 2))]
    assert bpr(torch.tensor([2.0]), others, allowed, 3).item() == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize("ranking_loss", [softmax, bpr])
def test_a_row_without_any_negative_has_no_loss(ranking_loss):
    assert ranking_loss(torch.zeros(1), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), 3).item() == 0


def test_rows_count_by_their_weights():
    network = recommender(example.project("mf of ratings", Path()).model, 3, 2, 0.0)
    users, items, ratings = torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1.0, 5.0])
    alone = network.loss(users[:1], items[:1], torch.ones(1), ratings[:1])
    both = network.loss(users, items, torch.tensor([2.0, 0.0]), ratings)
    torch.testing.assert_close(alone, both)
