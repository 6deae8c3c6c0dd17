"""What a candidate must show to be registered."""

from typing import Literal

from pydantic import Field

from app.config.section import Section

METRICS = ("auc", "accuracy", "precision", "recall", "f1")
"""The metrics that a gate may name, each better when higher."""

Metric = Literal["auc", "accuracy", "precision", "recall", "f1"]
Baseline = Literal["constant", "logistic_regression", "gradient_boosting"]


class Gate(Section):
    """What a candidate must show on the test part to be registered."""

    metric: Metric = "auc"
    """What is compared with the champion and the baselines."""
    minimum: dict[Metric, float] = Field({})
    beat: list[Baseline] = Field(["constant"])
    """Baselines that the candidate's metric must exceed."""
    tolerance: float = Field(0.0, ge=0)
    """How far below the champion's metric the candidate may be."""
