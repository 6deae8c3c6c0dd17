"""A sweep in the terminal: a live table, or elsewhere one line per finished trial."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.console import Console
from app.tuning.progress import Progress, Watch, ranked

NUM_BEST = 5
"""Number of best trials in the live table."""
COSTS = ("latency_ms", "size_mb")
"""Objectives that are not validation metrics."""
MINUTE_S, HOUR_S = 60, 3600


@contextlib.contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """The observer of a sweep's progress."""
    with console.live() as draw:
        num_printed = 0

        def watch(progress: Progress) -> None:
            nonlocal num_printed
            if draw is not None:
                draw(_table(progress))
                return
            for trial in progress.trials[max(num_printed, progress.num_earlier) :]:
                console.print(f"    {_line(trial, progress)}", style="dim")
            num_printed = len(progress.trials)

        yield watch


def summary(progress: Progress) -> str:
    """The numbers of finished, pruned and failed trials."""
    counts = [f"{len(progress.trials)} of {progress.num_trials} trials"]
    for state, word in ((TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")):
        if count := progress.count(state):
            counts.append(f"{count} {word}")
    return ", ".join(counts)


def describe_values(trial: FrozenTrial, objectives: list[str]) -> str:
    """The values of a trial's objectives."""
    return ", ".join(
        f"{name} {value:.3g}" if name in COSTS else f"validation {name} {value:.4f}"
        for name, value in zip(objectives, trial.values, strict=True)
    )


def _line(trial: FrozenTrial, progress: Progress) -> str:
    result = ""
    if trial.state == TrialState.COMPLETE:
        result = describe_values(trial, progress.objectives)
    elif trial.state == TrialState.FAIL:
        result = trial.user_attrs.get("error", "ended by another program")
    position = f"{len(progress.trials)}/{progress.num_trials}"
    state = trial.state.name.lower()
    return f"trial {trial.number} ({position}) {state:<8} {result}  {_describe_point(trial.params)}"


def _table(progress: Progress) -> Group:
    """The best trials so far, the running ones, and the time that is left."""
    left_s = progress.remaining_s()
    left = "" if left_s is None or left_s <= 0 else f", about {_describe_duration(left_s)} left"
    head = Text(f"  {progress.study}: {summary(progress)}{left}")
    table = Table(box=None, pad_edge=True, header_style="dim")
    for column in ("trial", "", "epochs", ", ".join(progress.objectives), "parameters"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    best = progress.best()
    for trial in ranked(progress.trials, progress.directions)[:NUM_BEST]:
        values = ", ".join(f"{value:.4f}" for value in trial.values)
        mark = "best" if trial in best else ""
        epochs = str(trial.user_attrs.get("epochs", ""))
        style = "green" if mark else ""
        table.add_row(str(trial.number), mark, epochs, values, _describe_point(trial.params), style=style)
    for number, running in sorted(progress.running.items()):
        value = "" if running.value is None else f"{running.value:.4f}"
        epochs, point = str(running.epochs), _describe_point(running.point)
        table.add_row(str(number), "running", epochs, value, point, style="cyan")
    return Group(head, table)


def _describe_point(point: dict[str, Any]) -> str:
    """Parameters by the last parts of their keys."""
    return "  ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def _describe_duration(seconds: float) -> str:
    if seconds < 1.5 * MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE_S:.0f} min" if seconds < 1.5 * HOUR_S else f"{seconds / HOUR_S:.1f} h"
