from typing import Literal

from app.config.families.model import Model, require_label


class Threshold(Model):
    """A logistic regression on one number."""

    kind: Literal["threshold"]
    slope: float = 1.0
    """Initial slope."""

    @property
    def score(self) -> str:
        return "auc"

    @property
    def test_metrics(self) -> tuple[str, ...]:
        return ("auc", "accuracy")

    @property
    def baselines(self) -> tuple[str, ...]:
        return ("constant",)

    def check(self, project) -> None:
        require_label(project, classes=False)
        if [project.data.columns[name].type for name in project.features] != ["number"]:
            raise ValueError("features: model.kind threshold takes one number")
