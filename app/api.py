"""Raylway from Python, for notebooks and scripts: `load`, `sweep`, `train`, `predict`.

    from app import api as raylway

    project = raylway.load("configs/income.yaml")
    result = raylway.sweep(project, trials=20)
    outcome = raylway.train(result.projects[0])
    raylway.predict(outcome, rows)

Each call does what the command of the same name does, with the same files, studies and versions. It joins the
cluster of `raylway up` if that is up, and starts one for its own duration otherwise.
"""

from pathlib import Path

import pandas as pd

from app.bundle.bundle import Bundle
from app.cluster.session import session
from app.config import Project, projectfile
from app.config.faults import require_within
from app.config.section import MAX_NUMBER
from app.console import Console
from app.jobs import pipeline, predictor
from app.jobs import predict as predicting
from app.jobs import sweep as sweeping
from app.jobs.pipeline import Outcome
from app.jobs.sweep import SweepResult


def load(file: str | Path, *overrides: str) -> Project:
    """Read a project file; `overrides` are those of `--set`, such as "training.epochs=3".

    Raises UserError, which names each fault with its line.
    """
    return projectfile.load(file, overrides)


def sweep(project: Project, *, trials: int | None = None) -> SweepResult:
    """Run the search that the project's `sweep` describes, or resume the stored study.

    `trials` replaces `sweep.trials`, the number of trials in all. Returns the best projects, all trials, and
    the path of the report. Raises UserError if the project has no `sweep`.
    """
    if trials is not None and project.sweep is not None:
        require_within("trials", trials, 1, MAX_NUMBER)
        project = project.model_copy(update={"sweep": project.sweep.model_copy(update={"trials": trials})})
    with session(log_to_driver=False):
        return sweeping.run(project, Console())


def train(project: Project, *, fresh: bool = False) -> Outcome:
    """Prepare, train, evaluate, pass the gate and register. Finished stages are skipped, unless `fresh`.

    `Outcome.version` is None if the gate rejected the candidate. Raises UserError if the data break their
    contract.
    """
    with session(log_to_driver=False):
        return pipeline.run(project, Console(), fresh=fresh)


def predict(model: Outcome | str | Path, rows: pd.DataFrame, *, k: int = 10) -> pd.DataFrame:
    """Predictions for `rows`, with their index.

    `model` is what `train` returned, the folder of a bundle, or a registered version such as
    "income@champion" or "income@3". The columns are `probability` for a binary label; `label` and the
    probability of each class for several classes; `items` and `scores`, the best `k`, for a recommender.
    Raises UserError if a column is missing or a row violates the contract.
    """
    folder = model.bundle if isinstance(model, Outcome) else predicting.folder(model)
    return predictor.predict(Bundle(folder), rows, k)
