"""Models on rows of numbers and categories."""

import warnings
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from app.config import Linear, Mlp
from app.data.features import Layout


class Columns(nn.Module):
    """Opens the matrix (rows, layout.width): places of embedded categories become their vectors.

    A category's place 0, a value never seen in training, has the zero vector and never learns.
    """

    def __init__(self, layout: Layout, width: int | None = None):
        """`width` overrides the length of all vectors."""
        super().__init__()
        self.dense = layout.dense
        sizes = [(count, width or length) for count, length in layout.embeddings]
        self.embeddings = nn.ModuleList(nn.Embedding(count, length, padding_idx=0) for count, length in sizes)
        self.width = layout.dense + sum(length for _, length in sizes)

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, self.dense :].to(torch.int64)
        vectors = [table(places[:, i]) for i, table in enumerate(self.embeddings)]
        return torch.cat([x[:, : self.dense], *vectors], dim=1)


class BinaryClassifier(nn.Module):
    """Gives the probability of the positive label; subclasses give its logit."""

    def logits(self, x: Tensor) -> Tensor:
        """float32 (rows, layout.width) -> (rows,)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """float32 (rows, layout.width) -> probabilities (rows,)."""
        return torch.sigmoid(self.logits(x))

    def loss(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean log loss of labels 0 and 1."""
        losses = binary_cross_entropy_with_logits(self.logits(x), y, reduction="none")
        return (losses * weight).sum() / weight.sum()


class LogisticRegression(BinaryClassifier):
    """A weight for each number and indicator, and one for each value of an embedded category."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.columns = Columns(layout, width=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no numbers there are no weights to initialise
            self.dense = nn.Linear(layout.dense, 1)
        for table in self.columns.embeddings:
            nn.init.zeros_(table.weight)

    def logits(self, x: Tensor) -> Tensor:
        opened = self.columns(x)
        dense = self.columns.dense
        return self.dense(opened[:, :dense]).squeeze(1) + opened[:, dense:].sum(dim=1)


class MultiLayerPerceptron(BinaryClassifier):
    """Linear layers with ReLU and dropout between them, on the opened matrix."""

    def __init__(self, layout: Layout, hidden: list[int], dropout: float):
        super().__init__()
        self.columns = Columns(layout)
        widths = [self.columns.width, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def logits(self, x: Tensor) -> Tensor:
        return self.layers(self.columns(x)).squeeze(1)


def linear(settings: Linear, layout: Layout) -> nn.Module:
    """Logistic regression."""
    return LogisticRegression(layout)


def mlp(settings: Mlp, layout: Layout) -> nn.Module:
    """A multi-layer perceptron."""
    return MultiLayerPerceptron(layout, list(settings.hidden), settings.dropout)
