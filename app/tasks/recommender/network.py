"""Networks that score pairs of a user and an item.

Users and items are indices in the catalogue. User 0 stands for unknown users: its vector is zero and not
trained.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from app.config.families import recommender as config

INITIAL_DEVIATION = 0.05
"""Standard deviation of the initial values of the vectors."""


class Recommender(nn.Module):
    """The base class of recommenders: biases, the scores of all items and the loss.

    A subclass computes `affinity`, the scores without biases.
    """

    def __init__(self, num_users: int, num_items: int, loss: str, mean: float = 0.0):
        """`num_users` includes user 0. `loss` is `softmax` or `bpr` for implicit feedback, or `squared_error`
        for ratings, whose mean is `mean`."""
        super().__init__()
        self.num_items = num_items
        self.loss_name = loss
        self.user_bias = _embedding(num_users, 1, deviation=0, padding_idx=0)
        self.item_bias = _embedding(num_items, 1, deviation=0)
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, users: Tensor) -> Tensor:
        """The scores of all items, (users, items), for users (users,)."""
        return self.score_all(users, torch.arange(self.num_items, device=users.device))

    def score_all(self, users: Tensor, items: Tensor) -> Tensor:
        """The scores (users, items) of all pairs of users (users,) and items (items,)."""
        return (
            self.affinity(users, items, all_pairs=True)
            + self.user_bias(users)
            + self.item_bias(items).T
            + self.mean
        )

    def score_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """The scores (pairs,) of users (pairs,), each with the item at the same index of items (pairs,)."""
        biases = (self.user_bias(users) + self.item_bias(items)).squeeze(1)
        return self.affinity(users, items, all_pairs=False) + biases + self.mean

    def affinity(self, users: Tensor, items: Tensor, all_pairs: bool) -> Tensor:
        """The scores of `score_all` if `all_pairs`, else those of `score_pairs`, without biases."""
        raise NotImplementedError

    def loss(self, users: Tensor, items: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        """The weighted mean loss, float32 (), of pairs of a user and an item.

        `users`, `items` and `weight` are (rows,). For implicit feedback, `more` is the negatives (n,), items
        that every row is compared with, and a mask, bool (rows, n), of the negatives that count for a row.
        For explicit feedback, `more` is the ratings (rows,).
        """
        scores = self.score_pairs(users, items)
        if self.loss_name == "squared_error":
            losses = (scores - more[0]).square()
        else:
            negatives, allowed = more
            negative_scores = self.score_all(users, negatives)
            losses = (softmax if self.loss_name == "softmax" else bpr)(
                scores, negative_scores, allowed, self.num_items
            )
        return (weight * losses).sum() / weight.sum()


def softmax(scores: Tensor, negative_scores: Tensor, allowed: Tensor, num_items: int) -> Tensor:
    """Sampled softmax, (rows,): the negative log-likelihood of the items among all that are allowed.

    `scores` (rows,) are those of the items, `negative_scores` (rows, n) those of the negatives, of which
    `allowed`, bool (rows, n), marks those that count. Each negative represents `num_items / n` items, so that
    few and many negatives estimate the same sum (Bengio and Senécal, 2008).
    """
    correction = math.log(num_items / negative_scores.shape[1])
    negative_scores = (negative_scores + correction).masked_fill(~allowed, -torch.inf)
    return torch.cat([scores[:, None], negative_scores], dim=1).logsumexp(dim=1) - scores


def bpr(scores: Tensor, negative_scores: Tensor, allowed: Tensor, num_items: int) -> Tensor:
    """Bayesian personalised ranking (Rendle et al., 2009), (rows,): the loss is small if the item scores
    above each negative. The arguments are those of `softmax`."""
    pairs = softplus(negative_scores - scores[:, None]) * allowed
    return pairs.sum(dim=1) / allowed.sum(dim=1).clamp(min=1)


class MatrixFactorization(Recommender):
    """The dot product of a user's and an item's vector, with biases (Koren et al., 2009).

    Well tuned, it is hard to beat (Rendle et al., 2020). Dropout applies to the user's vector.
    """

    def __init__(self, width: int, dropout: float, **shared: Any):
        super().__init__(**shared)
        self.user = _embedding(shared["num_users"], width, padding_idx=0)
        self.item = _embedding(shared["num_items"], width)
        self.dropout = nn.Dropout(dropout)

    def affinity(self, users: Tensor, items: Tensor, all_pairs: bool) -> Tensor:
        user, item = self.dropout(self.user(users)), self.item(items)
        return user @ item.T if all_pairs else (user * item).sum(dim=1)


class NeuralCollaborativeFiltering(Recommender):
    """NeuMF (He et al., 2017): the sum of a generalised matrix factorization and a perceptron.

    Each has its own vectors. The perceptron's first layer is the sum of a user's and an item's part, so each
    part is computed once for all pairs. The factorization starts as a plain dot product.
    """

    def __init__(self, width: int, hidden: list[int], dropout: float, **shared: Any):
        super().__init__(**shared)
        self.user = _embedding(shared["num_users"], 2 * width, padding_idx=0)
        self.item = _embedding(shared["num_items"], 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.of_user = nn.Linear(width, hidden[0])
        self.of_item = nn.Linear(width, hidden[0], bias=False)
        layers = [(nn.ReLU(), nn.Linear(width_in, width_out)) for width_in, width_out in pairwise(hidden)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer), nn.ReLU())
        self.output = nn.Linear(hidden[-1], 1, bias=False)
        self.product = nn.Parameter(torch.ones(width))

    def affinity(self, users: Tensor, items: Tensor, all_pairs: bool) -> Tensor:
        factors_user, inputs_user = self.dropout(self.user(users)).chunk(2, dim=1)
        factors_item, inputs_item = self.item(items).chunk(2, dim=1)
        factors_user = factors_user * self.product
        hidden_user, hidden_item = self.of_user(inputs_user), self.of_item(inputs_item)
        if all_pairs:
            product = factors_user @ factors_item.T
            hidden = hidden_user[:, None] + hidden_item[None]
        else:
            product = (factors_user * factors_item).sum(dim=1)
            hidden = hidden_user + hidden_item
        return product + self.output(self.layers(hidden)).squeeze(-1)


def _embedding(
    count: int, width: int, *, deviation: float = INITIAL_DEVIATION, padding_idx: int | None = None
) -> nn.Embedding:
    table = nn.Embedding(count, width, padding_idx=padding_idx)
    with torch.no_grad():
        table.weight.mul_(deviation)  # the row of padding_idx is zero
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
    """Make the network for `settings`. `num_users` includes user 0; `mean` is the mean rating."""
    loss = settings.loss if settings.feedback == "implicit" else "squared_error"
    return NETWORKS[settings.kind](settings, num_users=num_users, num_items=num_items, loss=loss, mean=mean)
