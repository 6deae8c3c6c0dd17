"""A study as one HTML page that needs no network: trials, importance of the parameters, and costs."""

import functools
import html
import importlib.resources
import json
from collections.abc import Iterator, Sequence
from string import Template
from typing import Any, NamedTuple

import optuna
import plotly.graph_objects as go
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import (
    plot_intermediate_values,
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_pareto_front,
    plot_slice,
)

from app.tuning.progress import best_of

PAGE = "report.html"
"""File beside this module with the template of the page."""
STATE_COLOURS = {"COMPLETE": "#2f7d4f", "PRUNED": "#c9a227", "FAIL": "#b3413a"}
MIN_TRIALS_TO_COMPARE = 4
"""Minimum number of complete trials for the figures that compare parameters."""


class Plot(NamedTuple):
    """A section of the page."""

    title: str
    about: str
    """What the figure shows, in HTML."""
    figure: go.Figure


def page(study: optuna.Study, objectives: Sequence[str]) -> str:
    """The page as HTML. `objectives` are the names of the study's values, in order."""
    trials = study.trials
    best = best_of(trials, [direction.name.lower() for direction in study.directions])
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sections = [_summary(trials, best, objectives)]
    for title, about, figure in _plots(study, complete, objectives):
        sections.append(f"<h2>{title}</h2><p class=about>{about}</p>{_figure(figure)}")
    sections.append("<h2>Trials</h2>" + _table(trials, best, objectives))
    template = importlib.resources.files(__package__).joinpath(PAGE).read_text()
    return Template(template).substitute(
        title=html.escape(f"Sweep {study.study_name}"), plotly=_plotly(), sections="".join(sections)
    )


def _plotly() -> str:
    """Plotly's JavaScript, which is part of the page."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _plots(study: optuna.Study, complete: list[FrozenTrial], objectives: Sequence[str]) -> Iterator[Plot]:
    """The plots for which the study has enough trials."""
    names = [html.escape(name) for name in objectives]
    has_several = len(names) > 1
    if has_several and len(names) <= 3 and complete:
        about = "Trials that no other beats in all objectives are in red."
        yield Plot("Pareto front", about, plot_pareto_front(study, target_names=names))
    for i, name in enumerate(names):
        target: dict[str, Any] = {"target_name": name}
        if has_several:
            target["target"] = functools.partial(_value, i)
        suffix = f" of {name}" if has_several else ""
        if complete:
            about = "Each complete trial's value, and the best so far."
            yield Plot(f"History{suffix}", about, plot_optimization_history(study, **target))
        if len(complete) < MIN_TRIALS_TO_COMPARE or len({trial.values[i] for trial in complete}) < 2:
            continue
        about = (
            "The share of the variance of the values that each parameter explains (fANOVA; Hutter et al., "
            "2014), over complete trials, for the parameters that all of them have."
        )
        importances = plot_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), **target)
        yield Plot(f"Importance of parameters{suffix}", about, importances)
        about = "A line for each complete trial; drag along an axis to select."
        yield Plot(f"Parallel coordinates{suffix}", about, plot_parallel_coordinate(study, **target))
        about = "The value against each parameter; later trials are darker."
        yield Plot(f"Slices{suffix}", about, plot_slice(study, **target))
    if not has_several and any(trial.intermediate_values for trial in study.trials):
        about = "Each trial's value after each epoch; the line of a trial that was stopped early ends early."
        yield Plot("Curves", about, plot_intermediate_values(study))
    if any("core_seconds" in trial.user_attrs for trial in study.trials):
        yield Plot("Cost", "Core-seconds of each trial.", _costs(study.trials))


def _value(i: int, trial: FrozenTrial) -> float:
    return trial.values[i]


def _costs(trials: Sequence[FrozenTrial]) -> go.Figure:
    """A bar for each trial's core-seconds, coloured by state."""
    figure = go.Figure()
    for state, colour in STATE_COLOURS.items():
        measured = [t for t in trials if t.state.name == state and "core_seconds" in t.user_attrs]
        figure.add_bar(
            x=[t.number for t in measured],
            y=[t.user_attrs["core_seconds"] for t in measured],
            name=state.lower(),
            marker_color=colour,
        )
    figure.update_layout(xaxis_title="Trial", yaxis_title="Core-seconds", barmode="stack")
    return figure


def _figure(figure: go.Figure) -> str:
    figure.update_layout(template="plotly_white", title=None, margin={"t": 30, "r": 20, "b": 50, "l": 60})
    return figure.to_html(full_html=False, include_plotlyjs=False, default_height="420px")


def _summary(trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], objectives: Sequence[str]) -> str:
    """The figures at the top of the page, by name."""
    counts = {state: sum(t.state.name == state for t in trials) for state in STATE_COLOURS}
    core_seconds = sum(t.user_attrs.get("core_seconds", 0.0) for t in trials)
    figures = {
        "trials": str(len(trials)),
        "complete": str(counts["COMPLETE"]),
        "pruned": str(counts["PRUNED"]),
        "failed": str(counts["FAIL"]),
        "core-hours": f"{core_seconds / 3600:.2f}",
    }
    if len(objectives) == 1 and best:
        value = f"{best[0].values[0]:.5g} (trial {best[0].number})"
        figures = {f"best {objectives[0]}": value} | figures
    cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in figures.items())
    return f"<dl>{''.join(cells)}</dl>"


def _table(trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], objectives: Sequence[str]) -> str:
    """All trials with values, epochs, cost, parameters and error: the best first, then by number."""
    best_numbers = {trial.number for trial in best}
    order = sorted(trials, key=lambda trial: (trial.number not in best_numbers, trial.number))
    names = sorted({key for trial in trials for key in trial.params})
    header = ["trial", "state", *objectives, "epochs", "core-seconds", *names, ""]
    rows = []
    for trial in order:
        values = [f"{value:.5g}" for value in trial.values or []] or [""] * len(objectives)
        cost = trial.user_attrs.get("core_seconds")
        cells = [
            str(trial.number), trial.state.name.lower(), *values, str(trial.user_attrs.get("epochs", "")),
            "" if cost is None else f"{cost:.1f}", *(_cell(trial.params.get(name)) for name in names),
            trial.user_attrs.get("error", ""),
        ]  # fmt: skip
        style = "best" if trial.number in best_numbers else "fail" if trial.state == TrialState.FAIL else ""
        rows.append(f"<tr class='{style}'>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: Any) -> str:
    """The text of a parameter's value."""
    if value is None:
        return ""
    return (
        f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )
