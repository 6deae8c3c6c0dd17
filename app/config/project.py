"""The project file: one YAML file that describes a model from its data to its endpoint."""

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
"""Pattern of a model's name. Names are part of URLs, paths, filters and tables."""
NAME_RULE = "at most 63 small letters, digits and dashes, and begin with a letter"

ENCODINGS: dict[str, tuple[tuple[type[Section], ...], str]] = {
    "number": ((NumberEncoding,), "min_max, quantile or piecewise_linear"),
    "category": ((OneHot, Embedding), "one_hot or embedding"),
    "text": ((Tokens,), "tokens"),
}
"""Allowed encodings of each type of column, and their names in messages."""


def require_name(name: str) -> None:
    """Raise UserError if no model can have this name."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"there is no model {shown(name)}: a name must have {NAME_RULE}")


def _require_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"must have {NAME_RULE}; it is {shown(name)}")
    return name


class Project(Section):
    """A project file. `name` and the sections `data`, `model`, `training` and `serving` are required."""

    name: Annotated[str, AfterValidator(_require_name)]
    """Name of the registered model and its endpoint: small letters, digits and dashes."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights, shuffling, dropout and sampling."""
    data: Data
    """The raw data, and the contract that the data and every request must meet."""
    features: dict[str, Encoding] = Field({})
    """Encodings of the columns that are inputs of the model, by column. Other columns of the contract are
    checked, but are no inputs. A recommender takes none: its inputs are users and items."""
    model: AnyModel
    """The kind of model and its architecture."""
    training: Training
    """How the model is trained."""
    sweep: Sweep | None = None
    """How `raylway sweep` searches for better settings. `raylway train` ignores it."""
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
            types, names = ENCODINGS[column.type]
            if not isinstance(encoding, types):
                raise ValueError(f"features.{name}: a {column.type} takes {names}, not {encoding.encode}")
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
