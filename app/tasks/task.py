"""The tasks: what differs between the families of models, from prepared rows to a bundle.

`app.training` and `app.jobs.pipeline` know no family; they ask the task.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pandas as pd
from torch import Tensor, nn

from app.config import Project, family_of
from app.data.prepare import Prepared

if TYPE_CHECKING:
    from app.bundle.bundle import Bundle
    from app.bundle.schema import Schema

Arrays = Mapping[str, Tensor]
"""Rows of a part as the training keeps them: tensors whose first axis is the rows."""


class Task(Protocol):
    """A project and its prepared data, seen by one family of models."""

    score: str
    """The validation metric that says which epoch is best; higher is better."""
    project: Project
    prepared: Prepared

    def __init__(self, project: Project, prepared: Prepared): ...

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


class Packager(Protocol):
    """Makes a bundle of a task's trained network, and measures it. The training needs none of it, so that a
    change here trains nothing anew."""

    task: Task

    def __init__(self, task: Task): ...

    def export(self, network: nn.Module, folder: Path) -> float:
        """Write `model.onnx` and all that a bundle needs to predict with it.

        Returns the largest difference to PyTorch on the test part; raises RuntimeError if that is too large.
        """

    def schema(self) -> "Schema":
        """What the bundle takes and gives."""

    def evaluate(self, bundle: "Bundle", rows: np.ndarray | None = None) -> dict[str, Any]:
        """A bundle on the test part, or on those of its rows where the mask `rows` is true.

        `model` has the metrics by name, other keys are for the card.
        """


def module_of(project: Project, part: Literal["task", "packager", "baselines"]) -> str:
    """The name of a module of the project's family.

    Each family of `app.config.FAMILIES` has a folder here, with the modules `task` with a class `Task`,
    `packager` with a class `Packager`, and `baselines` with a function of that name. They are imported when
    they are needed, because their libraries take seconds.
    """
    return f"app.tasks.{family_of(project.model)}.{part}"


def task_of(project: Project, prepared: Prepared) -> Task:
    """The task of a project."""
    return importlib.import_module(module_of(project, "task")).Task(project, prepared)


def packager_of(task: Task) -> Packager:
    """The packager of a task."""
    return importlib.import_module(module_of(task.project, "packager")).Packager(task)


def baselines_of(task: Task) -> dict[str, dict[str, float]]:
    """The metrics of each baseline on the test part, fitted on the training part with the same columns."""
    return importlib.import_module(module_of(task.project, "baselines")).baselines(task)
