"""Raylway from Python, for notebooks and scripts: `load`, `sweep`, `train`, `predict`.

    from app import api as raylway

    project = raylway.load("configs/income.yaml")
    found = raylway.sweep(project, trials=20)
    outcome = raylway.train(found.projects[0])
    raylway.predict(outcome, rows)

Each call does what the command of the same name does, with the same files, studies and versions. Ray is
joined as the commands join it: the cluster of `raylway up` if it is up, else one of the call's own.
"""

from pathlib import Path

import pandas as pd

from app.bundle.bundle import Bundle
from app.cluster.session import session
from app.config import Project, projectfile
from app.config.faults import require_within
from app.config.section import MAX_NUMBER
from app.console import Console
from app.jobs import pipeline
from app.jobs import predict as predicting
from app.jobs import sweep as sweeping
from app.jobs.pipeline import Outcome
from app.jobs.sweep import Swept


def load(file: str | Path, *overrides: str) -> Project:
    """Read a project file; `overrides` are as of `--set`, such as "training.epochs=3".

    Raises UserError that names each fault with its line.
    """
    return projectfile.load(file, overrides)


def sweep(project: Project, *, trials: int | None = None) -> Swept:
    """Search as the project's `sweep` says, or go on with the study that is stored.

    `trials` is how many in all. Returns the best projects and trials, and where the page about them is.
    """
    if trials is not None and project.sweep is not None:
        require_within("trials", trials, 1, MAX_NUMBER)
        project = project.model_copy(update={"sweep": project.sweep.model_copy(update={"trials": trials})})
    with session(log_to_driver=False):
        return sweeping.run(project, Console())


def train(project: Project, *, fresh: bool = False) -> Outcome:
    """Prepare, train, evaluate, pass the gate and register; what was done before is not done again."""
    with session(log_to_driver=False):
        return pipeline.run(project, Console(), fresh=fresh)


def predict(model: Outcome | str | Path, rows: pd.DataFrame, *, k: int = 10) -> pd.DataFrame:
    """A model's answers, a row for each of `rows` with their index.

    `model` is what `train` returned, the folder of a bundle, or a registered version such as
    "income@champion" or "income@3". The columns are `probability` of a binary label; `label` and the
    probability of each class of several; `items` and `scores`, the best `k`, of a recommender.
    Raises UserError for a column that is missing.
    """
    folder = model.bundle if isinstance(model, Outcome) else predicting.folder(model)
    return predicting.predict(Bundle(folder), rows, k)
