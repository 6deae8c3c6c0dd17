"""A project file, whole: one YAML file that describes a model's whole life."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from app.config.data import Category, Data, Embedding, Encoding, NumberEncoding, OneHot, Tokens
from app.config.families import AnyModel
from app.config.faults import shown
from app.config.gate import Compression, Evaluation, Gate
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
    model: AnyModel
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
        self.model.check(self)
        self._check_names("gate.metric", [self.gate.metric], self.model.test_metrics)
        self._check_names("gate.minimum", self.gate.minimum, self.model.test_metrics)
        self._check_names("gate.beat", self.gate.beat, self.model.baselines)
        if self.sweep is not None:
            self._check_names(
                "sweep.objectives", self.sweep.objectives, (*self.model.validation_metrics, *EXPORTED)
            )
        for name in self.evaluation.slices:
            if not isinstance(self.data.columns.get(name), Category):
                raise ValueError(f"evaluation.slices: {name!r} must be a category of data.columns")
        return self

    def _check_names(self, key: str, names: Iterable[str], allowed: Sequence[str]) -> None:
        for name in names:
            if name not in allowed:
                raise ValueError(
                    f"{key}: with model.kind {self.model.kind}, must be one of {', '.join(allowed)}; "
                    f"it is {name!r}"
                )
