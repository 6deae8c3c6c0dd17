"""What all parts of a project file share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_NUMBER = 1_000_000_000
"""No count, size or time of a project is larger; what computes with it then fits 32 bits, and so do sums of a
few of them 64."""

PositiveInt = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
Width = Annotated[int, Field(ge=1, le=65_536)]
"""Units of a layer, length of a vector, bins of a number: memory grows with it."""


class Section(BaseModel):
    """A part of the project file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
