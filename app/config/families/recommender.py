"""Models that recommend items to users."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from app.config.data import Category, Number, Split
from app.config.families.model import Model
from app.config.gate import RANKING_METRICS, RATING_METRICS
from app.config.section import PositiveFloat, PositiveInt, Width

if TYPE_CHECKING:
    from app.config.project import Project

OUTPUTS = ("items", "scores", "known")
"""Outputs of a recommender's graph; no input may have such a name."""


class Recommender(Model):
    """Keys and checks of all recommenders."""

    kind: str
    width: Width
    """Length of a user's and an item's vector."""
    feedback: Literal["implicit", "explicit"] = "implicit"
    """implicit: learn that an interaction took place, and rank items by how well they fit. explicit: learn
    and predict the rating, which is a poor predictor of what a user takes next."""
    loss: Literal["softmax", "bpr"] = "softmax"
    """Loss of implicit feedback. softmax: the likelihood of the item that was taken, among all items. bpr:
    the margin of that item's score over the score of each negative."""
    negatives: PositiveInt = 512
    """With implicit feedback, the number of items drawn for each batch, against which its rows are scored;
    items that the row's user has had do not count. If there are no more items than this, all are used."""
    recency: PositiveFloat | None = None
    """Weight of an interaction in the loss: exp(-age / recency), where age is the share of the user's
    interactions that came later. What a user takes next is more like what they took last."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the components of a user's vector that are set to 0 in training."""

    @property
    def score(self) -> str:
        return "hr@10" if self.feedback == "implicit" else "r2"

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        return ("loss", *self.test_metrics)

    @property
    def test_metrics(self) -> tuple[str, ...]:
        return RANKING_METRICS + (RATING_METRICS if self.feedback == "explicit" else ())

    @property
    def baselines(self) -> tuple[str, ...]:
        return ("popularity", "item_knn", "ease")

    def check(self, project: "Project") -> None:
        if (interactions := project.data.interactions) is None:
            raise ValueError(f"data.interactions: model.kind {self.kind} needs them, and takes no label")
        for key, name, kind in (
            ("user", interactions.user, Category),
            ("item", interactions.item, Category),
            ("rating", interactions.rating, Number),
        ):
            column = project.data.columns.get(name) if name is not None else None
            if name is not None and (not isinstance(column, kind) or column.nullable):
                required = f"a {kind.__name__.lower()} of data.columns that is not nullable"
                raise ValueError(f"data.interactions.{key}: {name!r} must be {required}")
        if interactions.user in OUTPUTS:
            raise ValueError("data.interactions.user: the model's output has this name; rename the column")
        for key, is_set in (
            ("features", project.features),
            ("data.split", project.data.split != Split()),
            ("training.class_weights", project.training.class_weights != "none"),
            ("evaluation.slices", project.evaluation.slices),
            ("sweep.folds", project.sweep is not None and project.sweep.folds),
        ):
            if is_set:
                raise ValueError(f"{key}: model.kind {self.kind} takes none; leave it out")
        if self.feedback == "explicit":
            if interactions.rating is None:
                raise ValueError("data.interactions.rating: explicit feedback needs the column of ratings")
            if project.gate.metric in RATING_METRICS and project.gate.beat:
                raise ValueError(f"gate.beat: no baseline has {project.gate.metric!r}; set beat: []")


class MatrixFactorization(Recommender):
    """The dot product of a user's and an item's vector."""

    kind: Literal["mf"]


class NeuralCollaborativeFiltering(Recommender):
    """NeuMF (He et al., 2017): the dot product and a perceptron together."""

    kind: Literal["ncf"]
    hidden: list[Width] = Field(min_length=1)
    """Units of each of the perceptron's layers."""
