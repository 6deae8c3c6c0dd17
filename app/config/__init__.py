"""What a project file may say, typed: frozen, unknown keys refused."""

from app.config.data import (
    Category,
    Column,
    Data,
    Embedding,
    Encoding,
    Label,
    MinMax,
    Number,
    OneHot,
    Source,
    Split,
)
from app.config.gate import METRICS, Gate
from app.config.model import Linear, Mlp, Model
from app.config.project import Project
from app.config.section import Section
from app.config.serving import Autoscaling, Serving, Variant
from app.config.training import Training

__all__ = [
    "METRICS",
    "Autoscaling",
    "Category",
    "Column",
    "Data",
    "Embedding",
    "Encoding",
    "Gate",
    "Label",
    "Linear",
    "MinMax",
    "Mlp",
    "Model",
    "Number",
    "OneHot",
    "Project",
    "Section",
    "Serving",
    "Source",
    "Split",
    "Training",
    "Variant",
]
