"""The sections of a project file as typed, frozen models."""

from app.config.data import (
    Category,
    Column,
    Data,
    Embedding,
    Encoding,
    Label,
    MinMax,
    Number,
    NumberEncoding,
    OneHot,
    PiecewiseLinear,
    Quantile,
    Source,
    Split,
    Text,
    Tokens,
)
from app.config.families import FAMILIES, Model, family_of
from app.config.gate import BINARY_METRICS, CLASS_METRICS, Compression, Evaluation, Gate
from app.config.project import Project
from app.config.section import Section
from app.config.serving import Autoscaling, Serving, Variant
from app.config.sweep import Choice, Float, Int, Parameter, Sweep
from app.config.training import Training

__all__ = [
    "BINARY_METRICS",
    "CLASS_METRICS",
    "FAMILIES",
    "Autoscaling",
    "Category",
    "Choice",
    "Column",
    "Compression",
    "Data",
    "Embedding",
    "Encoding",
    "Evaluation",
    "Float",
    "Gate",
    "Int",
    "Label",
    "MinMax",
    "Model",
    "Number",
    "NumberEncoding",
    "OneHot",
    "Parameter",
    "PiecewiseLinear",
    "Project",
    "Quantile",
    "Section",
    "Serving",
    "Source",
    "Split",
    "Sweep",
    "Text",
    "Tokens",
    "Training",
    "Variant",
    "family_of",
]
