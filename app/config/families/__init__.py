"""The families of models: the keys of each kind of model, and its checks of the other sections."""

from functools import reduce
from itertools import chain
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from app.config.families.model import Model
from app.config.families.recommender import MatrixFactorization, NeuralCollaborativeFiltering
from app.config.families.tabular import Linear, Mlp, TabM
from app.config.families.text import TextClassifier

FAMILIES: dict[str, tuple[type[Model], ...]] = {
    "tabular": (Linear, Mlp, TabM),
    "text": (TextClassifier,),
    "recommender": (MatrixFactorization, NeuralCollaborativeFiltering),
}
"""The kinds of models of each family. `app.tasks` has a folder with the family's name."""

if TYPE_CHECKING:  # a type checker cannot follow a union that is computed
    AnyModel = Model
else:
    AnyModel = Annotated[reduce(or_, chain(*FAMILIES.values())), Field(discriminator="kind")]


def family_of(model: Model) -> str:
    """The name of the family that a model belongs to."""
    return next(family for family, kinds in FAMILIES.items() if type(model) in kinds)
