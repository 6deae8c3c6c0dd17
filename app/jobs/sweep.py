"""A sweep as a person runs it: watched, kept in MLflow, and ended in a project file and a page."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.config import Project
from app.console import Console, short
from app.jobs import pipeline
from app.registry import sweep_runs
from app.state import files, shared
from app.state.home import home, make_private
from app.tuning import report as reports
from app.tuning import study as studies
from app.tuning import tuner
from app.tuning.progress import Progress, Watch, ranked
from app.tuning.space import Space

NUM_SHOWN = 5
"""Best trials in the live table."""


@dataclass(frozen=True)
class Swept:
    """What came of a sweep."""

    study: str
    objectives: list[str]
    trials: list[FrozenTrial]
    """All finished ones, in the order in which they finished."""
    best: list[FrozenTrial]
    """The best, or with several objectives those that none other beats."""
    projects: list[Project]
    """The project of each of the best."""
    files: list[Path]
    """The project file of each of them."""
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


def run(project: Project, console: Console) -> Swept:
    """Run a project's sweep to its end, or go on with it. Needs Ray. Raises as `tuner.run` does."""
    shared.require_shared()
    project = pipeline.with_key(project)
    space = Space(project)
    name = space.sweep.study or project.name
    with sweep_runs.sweep(project, name) as mlflow_runs, _watching(console) as watch:

        def on_trial(trial: FrozenTrial) -> None:
            mlflow_runs.log(_told(trial, space))

        def say(text: str) -> None:
            console.say(f"  {text}", style="yellow")

        progress = tuner.run(project, watch, say, on_trial)
    best = progress.best()
    if progress.end_reason:
        console.say(f"  ended: {progress.end_reason}")
    console.say(f"  {_summary(progress)}")
    written = [_write(space, trial, name, progress.objectives) for trial in best]
    page = report(project, None, console.wait)
    for trial, file in zip(best, written, strict=True):
        console.say(f"  trial {trial.number}: {_values(trial, progress.objectives)}: {short(file)}")
    console.say(f"  report: {short(page)}")
    projects = [space.project(point_of(trial)) for trial in best]
    return Swept(name, progress.objectives, progress.trials, best, projects, written, page)


def report(project: Project, file: Path | None, say: Callable[[str], None]) -> Path:
    """Write the page about a project's sweep; returns where. Raises UserError if nothing is stored of it.

    `say` is told if the database is away and waited for."""
    space = Space(project)
    name = space.sweep.study or project.name
    file = file or make_private(folder(name)) / "report.html"
    files.write(file, reports.page(studies.load(name, say), space.sweep.objectives))
    return file


def folder(name: str) -> Path:
    """Where a study's files are."""
    return home() / "sweeps" / name


def point_of(trial: FrozenTrial) -> dict[str, Any]:
    """The point at which a trial ended: population based training moves it."""
    return trial.user_attrs.get("point", trial.params)


def _write(space: Space, trial: FrozenTrial, name: str, objectives: list[str]) -> Path:
    """The project file of a trial: complete, and trained by `raylway train` to the same network."""
    file = make_private(folder(name)) / ("best.yaml" if len(objectives) == 1 else f"best-{trial.number}.yaml")
    head = f"# Trial {trial.number} of the study {name}: {_values(trial, objectives)}.\n"
    document = yaml.safe_dump(space.document(point_of(trial)), sort_keys=False, allow_unicode=True)
    files.write(file, head + document)
    return file


def _values(trial: FrozenTrial, objectives: list[str]) -> str:
    pairs = zip(objectives, trial.values, strict=True)
    return ", ".join(f"validation {name} {value:.4f}" if name not in ("latency_ms", "size_mb")
                     else f"{name} {value:.3g}" for name, value in pairs)  # fmt: skip


def _told(trial: FrozenTrial, space: Space) -> sweep_runs.Trial:
    histories: list[list[dict[str, float]]] = trial.user_attrs.get("history", [])
    curves: list[tuple[str, int, float]] = []
    for i, history in enumerate(histories):
        suffix = f"_fold_{i}" if len(histories) > 1 else ""
        curves += [
            (f"{name}{suffix}", int(metrics["epoch"]), value)
            for metrics in history
            for name, value in metrics.items()
            if name != "epoch"
        ]
    if not histories:
        name = space.sweep.objectives[0]
        curves = [(name, epochs - 1, value) for epochs, value in trial.intermediate_values.items()]
    values = dict(zip(space.sweep.objectives, trial.values or [], strict=False))
    tags = {"raylway.state": trial.state.name.lower()}
    if error := trial.user_attrs.get("error"):
        tags["raylway.error"] = error
    return sweep_runs.Trial(
        number=trial.number,
        status={"COMPLETE": "FINISHED", "PRUNED": "KILLED"}.get(trial.state.name, "FAILED"),
        parameters=space.decoded(point_of(trial)),
        curves=curves,
        values={**values, "core_seconds": trial.user_attrs.get("core_seconds", 0.0)},
        tags=tags,
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )


# What a person sees


@contextlib.contextmanager
def _watching(console: Console) -> Iterator[Watch]:
    """A table that changes in a terminal; elsewhere a line for each trial that ends."""
    with console.live() as show:
        said = 0

        def watch(progress: Progress) -> None:
            nonlocal said
            if show is not None:
                show(_table(progress))
                return
            for trial in progress.trials[max(said, progress.num_earlier) :]:
                console.say(f"    {_line(trial, progress)}", style="dim")
            said = len(progress.trials)

        yield watch


def _line(trial: FrozenTrial, progress: Progress) -> str:
    value = _values(trial, progress.objectives) if trial.state == TrialState.COMPLETE else ""
    if trial.state == TrialState.FAIL:
        value = trial.user_attrs.get("error", "ended by another program")
    done = f"{len(progress.trials)}/{progress.num_trials}"
    return f"trial {trial.number} ({done}) {trial.state.name.lower():<8} {value}  {_point(trial.params)}"


def _summary(progress: Progress) -> str:
    counted = [f"{len(progress.trials)} of {progress.num_trials} trials"]
    for state, word in ((TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")):
        if count := progress.count(state):
            counted.append(f"{count} {word}")
    return ", ".join(counted)


def _table(progress: Progress) -> Group:
    """The best so far, what runs now, and what is left."""
    left = progress.remaining_s()
    rest = "" if left is None or left <= 0 else f", about {_duration(left)} left"
    head = Text(f"  {progress.study}: {_summary(progress)}{rest}")
    table = Table(box=None, pad_edge=True, header_style="dim")
    for column in ("trial", "", "epochs", ", ".join(progress.objectives), "parameters"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    for trial in ranked(progress.trials, progress.directions)[:NUM_SHOWN]:
        values = ", ".join(f"{value:.4f}" for value in trial.values)
        first = "best" if trial in progress.best() else ""
        epochs = str(trial.user_attrs.get("epochs", ""))
        style = "green" if first else ""
        table.add_row(str(trial.number), first, epochs, values, _point(trial.params), style=style)
    for number, running in sorted(progress.running.items()):
        value = "" if running.value is None else f"{running.value:.4f}"
        table.add_row(str(number), "running", str(running.epochs), value, _point(running.point), style="cyan")
    return Group(head, table)


def _point(point: dict[str, Any]) -> str:
    """Short: the last part of a key says enough to a person who wrote the space."""
    return "  ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items())


def _short(value: Any) -> str:
    return (
        f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
