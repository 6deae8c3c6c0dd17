"""The tasks: what differs between the families of models, from prepared rows to a bundle.

`app.training` and `app.pipeline` know no family; they ask the task.
"""

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import Tensor, nn

from app.bundle import Bundle, Schema
from app.config import Project
from app.data.prepare import Prepared

Arrays = Mapping[str, Tensor]
"""Rows of a part as the training keeps them: tensors whose first axis is the rows."""


class Task(Protocol):
    """A project and its prepared data, seen by one family of models."""

    score: str
    """The validation metric that says which epoch is best; higher is better."""
    prepared: Prepared

    def __init__(self, project: Project, prepared: Prepared): ...

    # What a rank asks

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Rows of a part as arrays, made once by each rank for its own rows."""

    def network(self) -> nn.Module:
        """A network initialised from torch's global seed.

        Its `forward` is what is served; its `loss(*batch)` the mean loss of a batch.
        """

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimizer; `lr_scale` in one multiplies its learning rate."""

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        """An epoch's random order of row numbers, rearranged if batches should hold rows that go together."""

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """What `network.loss` takes, for these row numbers. Random choices are torch's global ones."""

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """What `metrics` needs of this rank's validation rows; the ranks' are joined along the rows."""

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """`loss` and the score, and what else is worth a curve."""

    # What the pipeline asks

    def export(self, network: nn.Module, folder: Path) -> float:
        """Write `model.onnx` and all that a bundle needs to predict with it.

        Returns the largest difference to PyTorch on the test part; raises RuntimeError if that is too large.
        """

    def schema(self) -> Schema:
        """What the bundle takes and gives."""

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        """A bundle on the test part, or on those of its rows where the mask `rows` is true.

        `model` has the metrics by name, other keys are for the card.
        """

    def baselines(self, *, fresh: bool) -> dict[str, dict[str, float]]:
        """The metrics of each baseline on the test part; done once for each prepared data set."""


TASKS = {
    "linear": "app.tasks.tabular.task:Tabular",
    "mlp": "app.tasks.tabular.task:Tabular",
    "tabm": "app.tasks.tabular.task:Tabular",
    "text_classifier": "app.tasks.text.task:Text",
    "mf": "app.tasks.recommender.task:Recommender",
    "ncf": "app.tasks.recommender.task:Recommender",
}
"""The Task of each `model.kind`. Names, because a family's libraries take seconds to import."""


def module_of(project: Project) -> str:
    """The module that a project's Task is in."""
    return TASKS[project.model.kind].partition(":")[0]


def task_of(project: Project, prepared: Prepared) -> Task:
    """The task of a project."""
    return pkgutil.resolve_name(TASKS[project.model.kind])(project, prepared)
