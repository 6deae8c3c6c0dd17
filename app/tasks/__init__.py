"""The families of models, one folder each: from prepared rows to a bundle.

Training, tuning and the jobs name no family. They get the task, the packager or the baselines of a project
from the functions in this module. A family's folder has the modules `task` with a class `Task`, `packager`
with a class `Packager`, and `baselines` with a function of that name. They are imported on first use, because
their libraries take seconds.
"""

import importlib
from typing import Literal

from app.config import Project, family_of
from app.data.prepare import Prepared
from app.tasks.task import Arrays, Packager, Task

__all__ = ["Arrays", "Packager", "Task", "baselines_of", "module_of", "packager_of", "task_of"]


def module_of(project: Project, part: Literal["task", "packager", "baselines"]) -> str:
    """The name of a module in the folder of the project's family."""
    return f"app.tasks.{family_of(project.model)}.{part}"


def task_of(project: Project, prepared: Prepared) -> Task:
    """The task of a project."""
    return importlib.import_module(module_of(project, "task")).Task(project, prepared)


def packager_of(task: Task) -> Packager:
    """The packager of a task."""
    return importlib.import_module(module_of(task.project, "packager")).Packager(task)


def baselines_of(task: Task) -> dict[str, dict[str, float]]:
    """Fit the family's baselines on the training part; returns the metrics of each on the test part."""
    return importlib.import_module(module_of(task.project, "baselines")).baselines(task)
