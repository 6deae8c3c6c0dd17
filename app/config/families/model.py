"""The base class of all kinds of models in a project file, whose properties each family defines."""

from typing import TYPE_CHECKING

from app.config.section import Section

if TYPE_CHECKING:
    from app.config.project import Project


class Model(Section):
    """The settings of a model. Each kind is a subclass whose first field is the literal `kind`."""

    kind: str

    @property
    def score(self) -> str:
        """Validation metric that decides which epoch is best; higher is better."""
        raise NotImplementedError

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Metrics of an epoch that a sweep may name as objectives."""
        return ("loss", self.score)

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """Metrics of the test part that a gate may name; higher is better."""
        raise NotImplementedError

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines that a gate may name."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> str | None:
        """Encoder whose tokenizer prepares the texts; None for a model that takes none."""
        return None

    @property
    def data_settings(self) -> tuple[str, ...]:
        """Settings on which the prepared data depend, besides `kind`."""
        return ()

    def check(self, project: "Project") -> None:
        """Raise ValueError if another section of the project does not fit the model."""
        raise NotImplementedError


def require_label(project: "Project", *, classes: bool) -> None:
    """Raise ValueError unless a project has features and a label: of several `classes`, or a binary one."""
    label, kind = project.data.label, project.model.kind
    if label is None:
        raise ValueError(f"data.label: model.kind {kind} needs one, and takes no interactions")
    if not project.features:
        raise ValueError("features: name at least one column of data.columns")
    if classes and label.classes is None:
        raise ValueError(f"data.label.classes: model.kind {kind} needs them, such as classes: [no, yes]")
    if not classes and label.classes is not None:
        raise ValueError(
            f"data.label.classes: model.kind {kind} takes a binary label; set positive or above instead"
        )
