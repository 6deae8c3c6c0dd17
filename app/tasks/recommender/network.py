"""Recommenders: a score for every pair of a user and an item.

Users and items are places in their catalogues. User 0 is whoever is not in it: the zero vector, never learnt.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from app.config.families import recommender as config

SPREAD = 0.05
"""Standard deviation of the vectors' components at the start."""


class Recommender(nn.Module):
    """What the recommenders share: biases, the scores of all items, the loss.

    A subclass gives `affinity`, the scores without biases.
    """

    def __init__(self, num_users: int, num_items: int, loss: str, mean: float = 0.0):
        """`num_users` counts user 0. `loss` is `softmax` or `bpr` for implicit feedback, or `squared_error`
        for ratings, of which `mean` is the mean."""
        super().__init__()
        self.num_items = num_items
        self.loss_name = loss
        self.user_bias = _embedding(num_users, 1, spread=0, padding_idx=0)
        self.item_bias = _embedding(num_items, 1, spread=0)
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, users: Tensor) -> Tensor:
        """The scores of all items, (users, items), for users (users,)."""
        return self.of_all(users, torch.arange(self.num_items, device=users.device))

    def of_all(self, users: Tensor, items: Tensor) -> Tensor:
        """The scores (users, items) of every one of users (users,) for every one of items (items,)."""
        return (
            self.affinity(users, items, every=True)
            + self.user_bias(users)
            + self.item_bias(items).T
            + self.mean
        )

    def of_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """The scores (pairs,) of users (pairs,) for an item each, (pairs,)."""
        biases = (self.user_bias(users) + self.item_bias(items)).squeeze(1)
        return self.affinity(users, items, every=False) + biases + self.mean

    def affinity(self, users: Tensor, items: Tensor, every: bool) -> Tensor:
        """As `of_all` if `every`, else as `of_pairs`, without biases."""
        raise NotImplementedError

    def loss(self, users: Tensor, items: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        """The mean loss of users' items, (rows,) each, with the rows' weights.

        `more` is of implicit feedback the negatives (n,), items that all rows are held against, and which of
        them count, bool (rows, n); of explicit feedback the ratings (rows,).
        """
        scores = self.of_pairs(users, items)
        if self.loss_name == "squared_error":
            losses = (scores - more[0]).square()
        else:
            negatives, allowed = more
            others = self.of_all(users, negatives)
            losses = (softmax if self.loss_name == "softmax" else bpr)(
                scores, others, allowed, self.num_items
            )
        return (weight * losses).sum() / weight.sum()


def softmax(scores: Tensor, others: Tensor, allowed: Tensor, num_items: int) -> Tensor:
    """Sampled softmax, (rows,): the negative log-likelihood of the items among all that are allowed.

    `scores` (rows,) are the items', `others` (rows, n) the negatives'. Each negative stands for
    `num_items / n` items, or few of them would teach something else than many (Bengio and Senécal, 2008).
    """
    represented = math.log(num_items / others.shape[1])
    others = (others + represented).masked_fill(~allowed, -torch.inf)
    return torch.cat([scores[:, None], others], dim=1).logsumexp(dim=1) - scores


def bpr(scores: Tensor, others: Tensor, allowed: Tensor, num_items: int) -> Tensor:
    """Bayesian personalised ranking, (rows,) (Rendle et al., 2009): each item above each negative."""
    pairs = softplus(others - scores[:, None]) * allowed
    return pairs.sum(dim=1) / allowed.sum(dim=1).clamp(min=1)


class MatrixFactorization(Recommender):
    """The dot product of a user's and an item's vector, with biases (Koren et al., 2009).

    Well tuned it is hard to beat (Rendle et al., 2020). Dropout is on the user's vector.
    """

    def __init__(self, width: int, dropout: float, **shared: Any):
        super().__init__(**shared)
        self.user = _embedding(shared["num_users"], width, padding_idx=0)
        self.item = _embedding(shared["num_items"], width)
        self.dropout = nn.Dropout(dropout)

    def affinity(self, users: Tensor, items: Tensor, every: bool) -> Tensor:
        user, item = self.dropout(self.user(users)), self.item(items)
        return user @ item.T if every else (user * item).sum(dim=1)


class NeuralCollaborativeFiltering(Recommender):
    """NeuMF (He et al., 2017): a generalised matrix factorization and a perceptron, each with vectors of its
    own, under one output layer.

    The perceptron's first layer is a sum of the user's and the item's share, so that all pairs of some users
    and items cost little more than the users and the items; it starts as a plain dot product.
    """

    def __init__(self, width: int, hidden: list[int], dropout: float, **shared: Any):
        super().__init__(**shared)
        self.user = _embedding(shared["num_users"], 2 * width, padding_idx=0)
        self.item = _embedding(shared["num_items"], 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.of_user = nn.Linear(width, hidden[0])
        self.of_item = nn.Linear(width, hidden[0], bias=False)
        layers = [(nn.ReLU(), nn.Linear(before, after)) for before, after in pairwise(hidden)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer), nn.ReLU())
        self.output = nn.Linear(hidden[-1], 1, bias=False)
        self.product = nn.Parameter(torch.ones(width))

    def affinity(self, users: Tensor, items: Tensor, every: bool) -> Tensor:
        user, mine = self.dropout(self.user(users)).chunk(2, dim=1)
        item, its = self.item(items).chunk(2, dim=1)
        user, mine, its = user * self.product, self.of_user(mine), self.of_item(its)
        product = user @ item.T if every else (user * item).sum(dim=1)
        pairs = mine[:, None] + its[None] if every else mine + its
        return product + self.output(self.layers(pairs)).squeeze(-1)


def _embedding(
    count: int, width: int, *, spread: float = SPREAD, padding_idx: int | None = None
) -> nn.Embedding:
    table = nn.Embedding(count, width, padding_idx=padding_idx)
    with torch.no_grad():
        table.weight.mul_(spread)  # a padding row is zero already
    return table


def mf(settings: config.MatrixFactorization, **shared: Any) -> Recommender:
    """A matrix factorization."""
    return MatrixFactorization(settings.width, settings.dropout, **shared)


def ncf(settings: config.NeuralCollaborativeFiltering, **shared: Any) -> Recommender:
    """Neural collaborative filtering."""
    return NeuralCollaborativeFiltering(settings.width, list(settings.hidden), settings.dropout, **shared)


NETWORKS: dict[str, Callable[..., Recommender]] = {"mf": mf, "ncf": ncf}
"""The network of each `model.kind`, from its settings and the arguments of `Recommender`."""


def recommender(settings: config.Recommender, num_users: int, num_items: int, mean: float) -> Recommender:
    """The network of a project's model; `num_users` counts user 0, `mean` is the mean rating."""
    loss = settings.loss if settings.feedback == "implicit" else "squared_error"
    return NETWORKS[settings.kind](settings, num_users=num_users, num_items=num_items, loss=loss, mean=mean)
