"""What all parts of a project file share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the project file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
