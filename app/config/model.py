"""The kinds of models, as a project file names them."""

from typing import Annotated, Literal

from pydantic import Field

from app.config.section import PositiveFloat, PositiveInt, Section, Width


class Linear(Section):
    """Logistic regression."""

    kind: Literal["linear"]


class PlainNumbers(Section):
    """As their columns in the matrix stand."""

    embed: Literal["none"]


class LinearNumbers(Section):
    """The columns of each number through a linear layer of its own and ReLU: with the encoding
    `piecewise_linear`, the PLE-LR of Gorishniy et al. (2022)."""

    embed: Literal["linear"]
    width: Width = 16
    """Of each number's vector."""


class PeriodicNumbers(Section):
    """Sines and cosines of learnt frequencies, a linear layer and ReLU, for each number its own: the PLR of
    Gorishniy et al. (2022). For numbers of one column: `min_max` or `quantile`."""

    embed: Literal["periodic"]
    width: Width = 16
    """Of each number's vector."""
    frequencies: Width = 32
    """Number of frequencies per number."""
    scale: PositiveFloat = 0.1
    """Standard deviation of the frequencies at the start, in cycles per unit: decides how wiggly."""


NumberEmbedding = Annotated[PlainNumbers | LinearNumbers | PeriodicNumbers, Field(discriminator="embed")]


class Mlp(Section):
    """A multi-layer perceptron with ReLU."""

    kind: Literal["mlp"]
    hidden: list[Width] = Field(min_length=1)
    """Units of each hidden layer."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the units of each hidden layer that are set to 0 in training."""
    numbers: NumberEmbedding = PlainNumbers(embed="none")
    """How numbers enter the first layer."""


class TabM(Section):
    """An ensemble of perceptrons in one: all share the weights, and each has its own scales, biases and
    output (Gorishniy et al., 2024)."""

    kind: Literal["tabm"]
    hidden: list[Width] = Field(min_length=1)
    """Units of each hidden layer."""
    members: Width = 16
    """Number of members of the ensemble."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the units of each hidden layer that are set to 0 in training."""
    numbers: NumberEmbedding = PlainNumbers(embed="none")
    """How numbers enter the first layer."""


class TextClassifier(Section):
    """A pretrained BERT encoder, fine-tuned, with a linear layer on the mean of its tokens' vectors."""

    kind: Literal["text_classifier"]
    encoder: str
    """A sample such as `minilm`, or a folder with `config.json`, `model.safetensors` and `tokenizer.json` as
    Hugging Face's transformers writes them."""
    freeze: bool = False
    """Leave the encoder as it is and fit the linear layer alone: minutes instead of hours, and less exact.
    It then takes more epochs and a learning rate of about 0.01."""
    layer_decay: float = Field(0.9, gt=0, le=1)
    """Each layer's learning rate, as a part of that of the layer above: the lower ones know what is common to
    all texts and should change less (Howard and Ruder, 2018)."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Before the linear layer; the encoder has its own."""


class Recommender(Section):
    """What the recommenders share."""

    kind: str
    width: Width
    """Of a user's and an item's vector."""
    feedback: Literal["implicit", "explicit"] = "implicit"
    """implicit: that an interaction took place is what is learnt, and items are ranked by how well they fit.
    explicit: the rating is learnt and predicted, which says little of what a user will take next."""
    loss: Literal["softmax", "bpr"] = "softmax"
    """Of implicit feedback. softmax: the item that was taken, among all. bpr: above each negative."""
    negatives: PositiveInt = 512
    """Of implicit feedback: items drawn for each batch that its rows are held against, but for those that
    a row's user has had. With as many as there are items, all of them."""
    recency: PositiveFloat | None = None
    """An interaction counts exp(-age / recency) in the loss, where age is the share of the user's
    interactions that came later. What a user takes next is more like what they took last."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the components of a user's vector."""


class MatrixFactorization(Recommender):
    """The dot product of a user's and an item's vector."""

    kind: Literal["mf"]


class NeuralCollaborativeFiltering(Recommender):
    """NeuMF (He et al., 2017): the dot product and a perceptron together."""

    kind: Literal["ncf"]
    hidden: list[Width] = Field(min_length=1)
    """Units of the perceptron's layers."""


Model = Annotated[
    Linear | Mlp | TabM | TextClassifier | MatrixFactorization | NeuralCollaborativeFiltering,
    Field(discriminator="kind"),
]
