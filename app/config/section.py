"""The base class of all sections of a project file, and the bounds of their numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_NUMBER = 1_000_000_000
"""Upper bound of every count, size and duration of a project: it fits 32 bits, and sums of a few fit 64."""

PositiveInt = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
Width = Annotated[int, Field(ge=1, le=65_536)]
"""Units of a layer, length of a vector, bins of a number. Bounded, since memory grows with it."""


class Section(BaseModel):
    """A section of the project file: frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
