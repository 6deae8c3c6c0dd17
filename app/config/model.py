"""The kinds of models, as a project file names them."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from app.config.section import Section


class Linear(Section):
    """Logistic regression."""

    kind: Literal["linear"]


class Mlp(Section):
    """A multi-layer perceptron with ReLU."""

    kind: Literal["mlp"]
    hidden: list[PositiveInt] = Field(min_length=1)
    """Units of each hidden layer."""
    dropout: float = Field(0.0, ge=0, lt=1)


Model = Annotated[Linear | Mlp, Field(discriminator="kind")]
