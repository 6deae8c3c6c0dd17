"""Models of rows of numbers and categories with a binary label."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from app.config.data import Tokens
from app.config.families.model import Model, require_label
from app.config.gate import BINARY_METRICS
from app.config.section import PositiveFloat, Section, Width

if TYPE_CHECKING:
    from app.config.project import Project


class PlainNumbers(Section):
    """Numbers enter the first layer as they are encoded."""

    embed: Literal["none"]


class LinearNumbers(Section):
    """Each number's columns pass a linear layer of its own and ReLU: with the encoding `piecewise_linear`,
    the PLE-LR of Gorishniy et al. (2022)."""

    embed: Literal["linear"]
    width: Width = 16
    """Length of each number's vector."""


class PeriodicNumbers(Section):
    """Each number passes sines and cosines, a linear layer and ReLU of its own: the PLR of Gorishniy et al.
    (2022). For encodings of one column: `min_max` or `quantile`."""

    embed: Literal["periodic"]
    width: Width = 16
    """Length of each number's vector."""
    frequencies: Width = 32
    """Number of frequencies per number."""
    scale: PositiveFloat = 0.1
    """Standard deviation of the initial frequencies, in cycles per unit. A larger one lets the model follow
    faster changes of the number."""


NumberEmbedding = Annotated[PlainNumbers | LinearNumbers | PeriodicNumbers, Field(discriminator="embed")]


class Tabular(Model):
    """Properties and checks of all tabular models."""

    @property
    def score(self) -> str:
        return "auc"

    @property
    def test_metrics(self) -> tuple[str, ...]:
        return BINARY_METRICS

    @property
    def baselines(self) -> tuple[str, ...]:
        return ("constant", "logistic_regression", "gradient_boosting")

    def check(self, project: "Project") -> None:
        require_label(project, classes=False)
        numbers = getattr(self, "numbers", None)
        for name, encoding in project.features.items():
            if isinstance(encoding, Tokens):
                raise ValueError(
                    f"features.{name}: model.kind {self.kind} takes no text; text_classifier does"
                )
            if isinstance(numbers, PeriodicNumbers) and encoding.encode == "piecewise_linear":
                raise ValueError(
                    f"features.{name}: model.numbers is periodic, which takes numbers of one column: set "
                    "min_max or quantile, or model.numbers: {embed: linear}"
                )


class Linear(Tabular):
    """Logistic regression."""

    kind: Literal["linear"]


class Mlp(Tabular):
    """A multi-layer perceptron with ReLU."""

    kind: Literal["mlp"]
    hidden: list[Width] = Field(min_length=1)
    """Units of each hidden layer."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the units of each hidden layer that are set to 0 in training."""
    numbers: NumberEmbedding = PlainNumbers(embed="none")
    """How numbers enter the first layer."""


class TabM(Tabular):
    """An ensemble of perceptrons in one: all share the weights, and each has its own scales, biases and
    output (Gorishniy et al., 2024)."""

    kind: Literal["tabm"]
    hidden: list[Width] = Field(min_length=1)
    """Units of each hidden layer."""
    members: Width = 16
    """Number of perceptrons in the ensemble."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the units of each hidden layer that are set to 0 in training."""
    numbers: NumberEmbedding = PlainNumbers(embed="none")
    """How numbers enter the first layer."""
