"""Networks from numbers and categories to the probability of a binary label."""

import math
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from app.config.families.tabular import Linear, LinearNumbers, Mlp, NumberEmbedding, PeriodicNumbers, TabM
from app.data.features import Layout


class Columns(nn.Module):
    """Replaces embedded numbers and categories by their vectors: (rows, layout.width) -> (rows, width).

    Index 0 of a category stands for values that do not occur in training: its vector is zero and not trained.
    """

    def __init__(self, layout: Layout, numbers: NumberEmbedding | None = None, width: int | None = None):
        """`numbers` are the settings of embedded numbers. `width` overrides the length of the categories'
        vectors."""
        super().__init__()
        self.dense = layout.dense
        self.embedded = 0
        """Number of columns of embedded numbers, which come first."""
        self.numbers: nn.Module | None = None
        sizes = [(count, width or length) for count, length in layout.embeddings]
        self.embeddings = nn.ModuleList(nn.Embedding(count, length, padding_idx=0) for count, length in sizes)
        self.width = layout.dense + sum(length for _, length in sizes)
        if layout.numbers and isinstance(numbers, LinearNumbers | PeriodicNumbers):
            self.embedded = sum(layout.numbers)
            self.width += len(layout.numbers) * numbers.width - self.embedded
            if isinstance(numbers, LinearNumbers):
                self.numbers = LinearEmbeddings(layout.numbers, numbers.width)
            else:
                self.numbers = PeriodicEmbeddings(layout.numbers, numbers)

    def forward(self, x: Tensor) -> Tensor:
        indices = x[:, self.dense :].to(torch.int64)
        vectors = [table(indices[:, i]) for i, table in enumerate(self.embeddings)]
        if self.numbers:
            vectors.append(self.numbers(x[:, : self.embedded]))
        return torch.cat([x[:, self.embedded : self.dense], *vectors], dim=1)


class LinearEmbeddings(nn.Module):
    """A linear layer and ReLU for the columns of each number (Gorishniy et al., 2022)."""

    def __init__(self, widths: tuple[int, ...], width: int):
        super().__init__()
        self.spans = list(pairwise(accumulate(widths, initial=0)))
        self.layers = nn.ModuleList(nn.Linear(num_columns, width) for num_columns in widths)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (rows, sum of widths) -> (rows, numbers * width)."""
        vectors = [layer(x[:, a:b]) for (a, b), layer in zip(self.spans, self.layers, strict=True)]
        return torch.relu(torch.cat(vectors, dim=1))


class PeriodicEmbeddings(nn.Module):
    """Sines and cosines with learnt frequencies, then `LinearEmbeddings` (Gorishniy et al., 2022)."""

    def __init__(self, widths: tuple[int, ...], settings: PeriodicNumbers):
        super().__init__()
        assert set(widths) == {1}, "the settings refuse numbers of several columns"
        count, num_waves = len(widths), settings.frequencies
        self.frequencies = nn.Parameter(torch.randn(count, num_waves) * settings.scale)
        self.linear = LinearEmbeddings((2 * num_waves,) * count, settings.width)

    def forward(self, x: Tensor) -> Tensor:
        """float32 (rows, numbers) -> (rows, numbers * width)."""
        angles = 2 * math.pi * x[:, :, None] * self.frequencies
        return self.linear(torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1))


class BinaryClassifier(nn.Module):
    """A network for the probability of the positive label. A subclass computes the logit."""

    def logits(self, x: Tensor) -> Tensor:
        """float32 (rows, layout.width) -> (rows,), or (rows, members) for an ensemble."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """float32 (rows, layout.width) -> probabilities (rows,), for an ensemble the mean of its members."""
        probabilities = torch.sigmoid(self.logits(x))
        return probabilities if probabilities.ndim == 1 else probabilities.mean(dim=1)

    def loss(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean log loss, float32 (), of labels 0 and 1; `y` and `weight` are float32 (rows,).

        For an ensemble, the mean of its members' losses.
        """
        logits = self.logits(x)
        if logits.ndim == 2:
            y, weight = (t[:, None].expand_as(logits) for t in (y, weight))
        losses = binary_cross_entropy_with_logits(logits, y, reduction="none")
        return (losses * weight).sum() / weight.sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer. Only weights decay; biases, frequencies and scales do not."""
        named = list(self.named_parameters())
        return [
            {"params": [p for name, p in named if name.endswith("weight")]},
            {"params": [p for name, p in named if not name.endswith("weight")], "weight_decay": 0.0},
        ]


class LogisticRegression(BinaryClassifier):
    """Logistic regression: a weight for each number, indicator and value of an embedded category."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.columns = Columns(layout, width=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns if there are no numbers, so no weights
            self.dense = nn.Linear(layout.dense, 1)
        for table in self.columns.embeddings:
            nn.init.zeros_(table.weight)

    def logits(self, x: Tensor) -> Tensor:
        vectors = self.columns(x)
        dense = self.columns.dense
        return self.dense(vectors[:, :dense]).squeeze(1) + vectors[:, dense:].sum(dim=1)


class MultiLayerPerceptron(BinaryClassifier):
    """Linear layers with ReLU and dropout between them."""

    def __init__(
        self, layout: Layout, hidden: list[int], dropout: float, numbers: NumberEmbedding | None = None
    ):
        super().__init__()
        self.columns = Columns(layout, numbers)
        widths = [self.columns.width, *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def logits(self, x: Tensor) -> Tensor:
        return self.layers(self.columns(x)).squeeze(1)


class TabularEnsemble(BinaryClassifier):
    """TabM (Gorishniy et al., 2024): perceptrons that share weights; each has its own scales and biases.

    Each member has its own output and loss; the prediction is the mean of the members' probabilities.
    """

    def __init__(
        self,
        layout: Layout,
        hidden: list[int],
        dropout: float,
        members: int,
        numbers: NumberEmbedding | None = None,
    ):
        super().__init__()
        self.columns = Columns(layout, numbers)
        widths = [self.columns.width, *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [SharedLinear(members, width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, MembersOutput(members, widths[-1]))
        nn.init.normal_(self.layers[0].scale_in)  # makes the members differ

    def logits(self, x: Tensor) -> Tensor:
        return self.layers(self.columns(x)[:, None])


class SharedLinear(nn.Module):
    """A linear layer for all members of an ensemble (BatchEnsemble; Wen et al., 2020).

    (rows, members or 1, width_in) -> (rows, members, width_out). The members share the weight; each has its
    own bias and scales of inputs and outputs.
    """

    def __init__(self, members: int, width_in: int, width_out: int):
        super().__init__()
        bound = max(width_in, 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(width_out, width_in).uniform_(-bound, bound))
        self.scale_in = nn.Parameter(torch.ones(members, width_in))
        self.scale_out = nn.Parameter(torch.ones(members, width_out))
        self.bias = nn.Parameter(torch.empty(members, width_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale_in) @ self.weight.T * self.scale_out + self.bias


class MembersOutput(nn.Module):
    """A linear output for each member: (rows, members, width_in) -> (rows, members)."""

    def __init__(self, members: int, width_in: int):
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(members, width_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(dim=2) + self.bias


def linear(settings: Linear, layout: Layout) -> nn.Module:
    """Logistic regression."""
    return LogisticRegression(layout)


def mlp(settings: Mlp, layout: Layout) -> nn.Module:
    """A multi-layer perceptron."""
    return MultiLayerPerceptron(layout, list(settings.hidden), settings.dropout, settings.numbers)


def tabm(settings: TabM, layout: Layout) -> nn.Module:
    """An ensemble of perceptrons that share weights."""
    return TabularEnsemble(
        layout, list(settings.hidden), settings.dropout, settings.members, settings.numbers
    )


NETWORKS: dict[str, Callable[[Any, Layout], nn.Module]] = {"linear": linear, "mlp": mlp, "tabm": tabm}
"""The network of each `model.kind`, from its settings and the layout of its inputs."""
