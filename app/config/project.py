"""A project file, whole: one YAML file that describes a model's whole life."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from app.config.data import Category, Data, Embedding, Encoding, Number, NumberEncoding, OneHot, Split, Tokens
from app.config.faults import shown
from app.config.gate import (
    BASELINES,
    CLASS_METRICS,
    METRICS,
    RANKING_BASELINES,
    RANKING_METRICS,
    RATING_METRICS,
    TEXT_BASELINES,
    Compression,
    Evaluation,
    Gate,
)
from app.config.model import Model, PeriodicNumbers, Recommender, TextClassifier
from app.config.section import Section
from app.config.serving import Serving
from app.config.sweep import EXPORTED, Sweep
from app.config.training import Training
from app.errors import UserError

NAME = "[a-z][a-z0-9-]{0,62}"
"""A model's name. It stands in URLs, paths, filters and tables, so nothing else may get there."""
OF_NAMES = "at most 63 small letters, digits and dashes, and begin with a letter"


def require_name(name: str) -> None:
    """Raise UserError if no model can have this name."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"there is no model {shown(name)}: a name must have {OF_NAMES}")


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"must have {OF_NAMES}; it is {shown(name)}")
    return name


class Project(Section):
    """A project file, whole."""

    name: Annotated[str, AfterValidator(_name)]
    """The registered model's name and the endpoint's: small letters, digits and dashes."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights, shuffling, dropout and sampling."""
    data: Data
    """The raw data, and the contract that the data and every request must meet."""
    features: dict[str, Encoding] = Field({})
    """The columns that the model sees, and how. A column of the contract that is not named here is
    checked, but no input of the model. A recommender takes none: it sees users and items alone."""
    model: Model
    """The kind of model and its architecture."""
    training: Training
    """How the model is trained."""
    sweep: Sweep | None = None
    """How `raylway sweep` searches for better settings; a training takes no notice of it."""
    evaluation: Evaluation = Evaluation()
    """Further results on the test part."""
    gate: Gate = Gate()
    """What a candidate must show on the test part to be registered."""
    compression: Compression = Compression()
    """What `raylway compress` accepts."""
    serving: Serving
    """The endpoint: variants, replicas, limits and authentication."""

    @property
    def score(self) -> str:
        """The validation metric that says which epoch is best; higher is better."""
        if isinstance(self.model, Recommender):
            return "hr@10" if self.model.feedback == "implicit" else "r2"
        return "macro_f1" if isinstance(self.model, TextClassifier) else "auc"

    @model_validator(mode="after")
    def _consistent(self) -> "Project":
        if self.data.label and self.data.label.column in self.data.columns:
            raise ValueError(f"data.label.column: {self.data.label.column!r} must not be one of data.columns")
        for name, encoding in self.features.items():
            if name == "probability":
                raise ValueError(f"features.{name}: the model's output has this name; rename the column")
            column = self.data.columns.get(name)
            if column is None:
                raise ValueError(
                    f"features.{name}: no such column; data.columns has {', '.join(self.data.columns)}"
                )
            suits: dict[str, tuple[type, ...]] = {
                "number": (NumberEncoding,), "category": (OneHot, Embedding), "text": (Tokens,)
            }  # fmt: skip
            if not isinstance(encoding, suits[column.type]):
                fits = {
                    "number": "min_max, quantile or piecewise_linear",
                    "category": "one_hot or embedding",
                    "text": "tokens",
                }[column.type]
                raise ValueError(f"features.{name}: a {column.type} takes {fits}, not {encoding.encode}")
            numbers = getattr(self.model, "numbers", None)
            if isinstance(numbers, PeriodicNumbers) and encoding.encode == "piecewise_linear":
                raise ValueError(
                    f"features.{name}: model.numbers is periodic, which takes numbers of one column: say "
                    "min_max or quantile, or model.numbers: {embed: linear}"
                )
        self._check_family()
        if self.sweep is not None:
            self._check_sweep(self.sweep)
        for name in self.evaluation.slices:
            if not isinstance(self.data.columns.get(name), Category):
                raise ValueError(f"evaluation.slices: {name!r} must be a category of data.columns")
        return self

    def _check_family(self) -> None:
        """Raise ValueError if label, features and gate do not fit the model."""
        if isinstance(self.model, Recommender):
            self._check_recommender(self.model)
            return
        if self.data.label is None:
            raise ValueError(
                f"data.label: a {self.model.kind} needs one; model.kind mf and ncf take interactions"
            )
        if not self.features:
            raise ValueError("features: name at least one column of data.columns")
        tokens = [name for name, encoding in self.features.items() if isinstance(encoding, Tokens)]
        kind = self.model.kind
        if isinstance(self.model, TextClassifier):
            if self.data.label.classes is None:
                raise ValueError(f"data.label.classes: a {kind} needs them, such as classes: [no, yes]")
            if len(self.features) != 1 or not tokens:
                raise ValueError(f"features: a {kind} takes one text, such as text: {{encode: tokens}}")
            metrics, baselines = list(CLASS_METRICS), list(TEXT_BASELINES)
        else:
            if self.data.label.classes is not None:
                raise ValueError(f"data.label.classes: a {kind} takes a binary label: positive or above")
            if tokens:
                raise ValueError(
                    f"features.{tokens[0]}: a {kind} takes no text; model.kind text_classifier does"
                )
            metrics, baselines = list(METRICS), list(BASELINES)
        self._check_gate(metrics, baselines)

    def _check_sweep(self, sweep: Sweep) -> None:
        if isinstance(self.model, Recommender):
            metrics = [
                "loss",
                *RANKING_METRICS,
                *(RATING_METRICS if self.model.feedback == "explicit" else []),
            ]
        else:
            metrics = ["loss", "macro_f1" if isinstance(self.model, TextClassifier) else "auc"]
        for name in sweep.objectives:
            if name not in (*metrics, *EXPORTED):
                allowed = ", ".join((*metrics, *EXPORTED))
                raise ValueError(f"sweep.objectives: of a {self.model.kind}, of {allowed}; one is {name!r}")
        if sweep.folds and isinstance(self.model, Recommender):
            raise ValueError("sweep.folds: a recommender leaves one out, which has no folds; leave it out")

    def _check_recommender(self, model: Recommender) -> None:
        if (interactions := self.data.interactions) is None:
            raise ValueError(f"data.interactions: a {model.kind} needs them, and takes no label")
        for key, name, kind in (
            ("user", interactions.user, Category),
            ("item", interactions.item, Category),
            ("rating", interactions.rating, Number),
        ):
            column = self.data.columns.get(name) if name is not None else None
            if name is not None and (not isinstance(column, kind) or column.nullable):
                wanted = f"a {kind.__name__.lower()} of data.columns that is not nullable"
                raise ValueError(f"data.interactions.{key}: {name!r} must be {wanted}")
        if interactions.user in ("items", "scores", "known"):
            raise ValueError("data.interactions.user: the model's output has this name; rename the column")
        for key, given in (
            ("features", self.features),
            ("data.split", self.data.split != Split()),
            ("training.class_weights", self.training.class_weights != "none"),
            ("evaluation.slices", self.evaluation.slices),
        ):
            if given:
                raise ValueError(f"{key}: a {model.kind} takes none; leave it out")
        metrics, baselines = list(RANKING_METRICS), list(RANKING_BASELINES)
        if model.feedback == "explicit":
            if interactions.rating is None:
                raise ValueError("data.interactions.rating: explicit feedback needs the column of ratings")
            metrics += RATING_METRICS
            if self.gate.metric in RATING_METRICS and self.gate.beat:
                raise ValueError(f"gate.beat: no baseline has {self.gate.metric!r}; say beat: []")
        self._check_gate(metrics, baselines)

    def _check_gate(self, metrics: list[str], baselines: list[str]) -> None:
        kind = self.model.kind
        for key, named, allowed in (
            ("metric", [self.gate.metric], metrics),
            ("minimum", self.gate.minimum, metrics),
            ("beat", self.gate.beat, baselines),
        ):
            for name in named:
                if name not in allowed:
                    raise ValueError(f"gate.{key}: of a {kind}, one of {', '.join(allowed)}; it is {name!r}")
