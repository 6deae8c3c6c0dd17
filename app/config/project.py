"""A project file, whole: one YAML file that describes a model's whole life."""

from pydantic import Field, model_validator

from app.config.data import Data, Encoding
from app.config.gate import Gate
from app.config.model import Model
from app.config.section import Section
from app.config.serving import Serving
from app.config.training import Training


class Project(Section):
    """A project file, whole."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")
    """The registered model's name and the endpoint's: small letters, digits and dashes."""
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data
    features: dict[str, Encoding] = Field(min_length=1)
    """The columns that the model sees, and how. A column of the contract that is not named here is
    checked, but no input of the model."""
    model: Model
    training: Training
    gate: Gate = Gate()
    serving: Serving

    @model_validator(mode="after")
    def _consistent(self) -> "Project":
        if self.data.label.column in self.data.columns:
            raise ValueError(f"data.label.column: {self.data.label.column!r} must not be one of data.columns")
        for name, encoding in self.features.items():
            if name == "probability":
                raise ValueError(f"features.{name}: the model's output has this name; rename the column")
            column = self.data.columns.get(name)
            if column is None:
                raise ValueError(
                    f"features.{name}: no such column; data.columns has {', '.join(self.data.columns)}"
                )
            if (column.type == "number") != (encoding.encode == "min_max"):
                fits = "min_max" if column.type == "number" else "one_hot or embedding"
                raise ValueError(f"features.{name}: a {column.type} takes {fits}, not {encoding.encode}")
        return self
