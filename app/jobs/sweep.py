"""A sweep from start to end: it runs the search, logs it to MLflow, and writes project files and a report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from optuna.trial import FrozenTrial

from app.config import Project
from app.console import Console, short_path
from app.jobs import pipeline, sweep_view
from app.registry import sweep_runs
from app.registry.sweep_runs import CurvePoint
from app.state import files, shared
from app.state.home import home, make_private
from app.tuning import report as reports
from app.tuning import study as studies
from app.tuning import tuner
from app.tuning.space import Space


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep."""

    study: str
    objectives: list[str]
    trials: list[FrozenTrial]
    """All finished trials, in the order in which they finished."""
    best: list[FrozenTrial]
    """Best trial, or with several objectives the trials that no other beats."""
    projects: list[Project]
    """Project of each of the best trials."""
    files: list[Path]
    """Project file of each of the best trials."""
    report: Path

    def table(self) -> pd.DataFrame:
        """The trials by number: state, a column for each objective, epochs, core-seconds, and parameters."""
        rows = [
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                **dict(zip(self.objectives, trial.values or [], strict=False)),
                "epochs": trial.user_attrs.get("epochs", 0),
                "core_seconds": trial.user_attrs.get("core_seconds", 0.0),
                **trial.params,
            }
            for trial in self.trials
        ]
        return pd.DataFrame(rows).set_index("trial").sort_index()


def run(project: Project, console: Console) -> SweepResult:
    """Run a project's sweep to its end, or resume it. Needs Ray. Raises UserError like `tuner.run`."""
    shared.require_shared()
    project = pipeline.with_champion_key(project)
    space = Space(project)
    name = space.sweep.study or project.name
    with sweep_runs.sweep(project, name) as mlflow_runs, sweep_view.watching(console) as watch:

        def on_trial(trial: FrozenTrial) -> None:
            mlflow_runs.log(_logged_trial(trial, space))

        def on_note(text: str) -> None:
            console.print(f"  {text}", style="yellow")

        progress = tuner.run(project, watch, on_note, on_trial)
    best = progress.best()
    if progress.end_reason:
        console.print(f"  ended: {progress.end_reason}")
    console.print(f"  {sweep_view.summary(progress)}")
    project_files = [_write_project(space, trial, name, progress.objectives) for trial in best]
    page = report(project, None, console.print_wait)
    for trial, file in zip(best, project_files, strict=True):
        scores = sweep_view.describe_values(trial, progress.objectives)
        console.print(f"  trial {trial.number}: {scores}: {short_path(file)}")
    console.print(f"  report: {short_path(page)}")
    projects = [space.project(point_of(trial)) for trial in best]
    return SweepResult(name, progress.objectives, progress.trials, best, projects, project_files, page)


def report(project: Project, file: Path | None, on_wait: Callable[[str], None]) -> Path:
    """Write the report on a project's sweep, and return its path.

    `on_wait` is called if the database is unavailable. Raises UserError if no such study is stored.
    """
    space = Space(project)
    name = space.sweep.study or project.name
    file = file or make_private(_folder(name)) / "report.html"
    files.write(file, reports.page(studies.load(name, on_wait), space.sweep.objectives))
    return file


def _folder(study: str) -> Path:
    """The folder of a study's files."""
    return home() / "sweeps" / study


def point_of(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters with which a trial ended; population based training changes them."""
    return trial.user_attrs.get("point", trial.params)


def _write_project(space: Space, trial: FrozenTrial, study: str, objectives: list[str]) -> Path:
    """Write the complete project file of a trial; `raylway train` trains the same network from it."""
    name = "best.yaml" if len(objectives) == 1 else f"best-{trial.number}.yaml"
    file = make_private(_folder(study)) / name
    scores = sweep_view.describe_values(trial, objectives)
    comment = f"# Trial {trial.number} of the study {study}: {scores}.\n"
    document = yaml.safe_dump(space.document(point_of(trial)), sort_keys=False, allow_unicode=True)
    files.write(file, comment + document)
    return file


def _logged_trial(trial: FrozenTrial, space: Space) -> sweep_runs.Trial:
    """A trial as MLflow logs it."""
    values = dict(zip(space.sweep.objectives, trial.values or [], strict=False))
    tags = {"raylway.state": trial.state.name.lower()}
    if error := trial.user_attrs.get("error"):
        tags["raylway.error"] = error
    return sweep_runs.Trial(
        number=trial.number,
        status={"COMPLETE": "FINISHED", "PRUNED": "KILLED"}.get(trial.state.name, "FAILED"),
        parameters=space.decode(point_of(trial)),
        curves=_curves(trial, space.sweep.objectives),
        values={**values, "core_seconds": trial.user_attrs.get("core_seconds", 0.0)},
        tags=tags,
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )


def _curves(trial: FrozenTrial, objectives: list[str]) -> list[CurvePoint]:
    """All metrics of each epoch, by fold; without a history, the first objective's intermediate values."""
    histories: list[list[dict[str, float]]] = trial.user_attrs.get("history", [])
    if not histories:
        intermediate = trial.intermediate_values.items()
        return [CurvePoint(objectives[0], num_epochs - 1, value) for num_epochs, value in intermediate]
    curves = []
    for fold, history in enumerate(histories):
        suffix = f"_fold_{fold}" if len(histories) > 1 else ""
        curves += [
            CurvePoint(f"{name}{suffix}", int(metrics["epoch"]), value)
            for metrics in history
            for name, value in metrics.items()
            if name != "epoch"
        ]
    return curves
