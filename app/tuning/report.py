"""A study as one HTML page that needs no network: what was tried, what matters, and what it cost."""

import functools
import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

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

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px;
       color: #1c2430; margin: 2rem auto }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p.about { color: #5a6675; margin: .2rem 0 .6rem }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #e3e8ee; vertical-align: top }
th { color: #5a6675; font-weight: 600 } tr.best td { background: #eef7ee } tr.fail td { color: #a33 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .6rem; margin: 1rem 0 }
dl div { background: #f4f6f9; border-radius: 8px; padding: .6rem .9rem }
dt { color: #5a6675; font-size: 13px }
dd { margin: 0; font-size: 1.25rem }
"""


def page(study: optuna.Study, objectives: Sequence[str]) -> str:
    """The page. `objectives` are the names of the study's values, in order."""
    trials = study.trials
    ways = [direction.name.lower() for direction in study.directions]
    best = best_of(trials, ways)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sections = [_facts(trials, best, objectives)]
    for title, about, figure in _plots(study, complete, objectives):
        sections.append(f"<h2>{title}</h2><p class=about>{about}</p>{_plotted(figure)}")
    sections.append("<h2>Trials</h2>" + _table(trials, best, objectives))
    library = _library()
    title = html.escape(f"Sweep {study.study_name}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<script>{library}</script><h1>{title}</h1>{''.join(sections)}</html>"
    )


def _library() -> str:
    """Plotly's JavaScript, so that the page shows its plots anywhere."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _plots(
    study: optuna.Study, complete: list[FrozenTrial], objectives: Sequence[str]
) -> Iterator[tuple[str, str, go.Figure]]:
    """Title, what is to be seen, and the figure: those that these trials can fill."""
    names = [html.escape(name) for name in objectives]
    several = len(names) > 1
    if several and len(names) <= 3 and complete:
        about = "Trials that no other beats in all objectives are in red."
        yield "Pareto front", about, plot_pareto_front(study, target_names=names)
    for i, name in enumerate(names):
        goal: dict[str, Any] = {"target_name": name}
        if several:
            goal["target"] = functools.partial(_value, i)
        of = f" of {name}" if several else ""
        if complete:
            about = "Each complete trial's value, and the best so far."
            yield f"History{of}", about, plot_optimization_history(study, **goal)
        if len(complete) < 4 or len({trial.values[i] for trial in complete}) < 2:
            continue
        about = (
            "The share of the values' variance that each explains (fANOVA; Hutter et al., 2014), over "
            "complete trials, of the parameters that all of them have."
        )
        by = FanovaImportanceEvaluator(seed=0)
        yield f"Importance of parameters{of}", about, plot_param_importances(study, evaluator=by, **goal)
        about = "A line for each complete trial; drag along an axis to select."
        yield f"Parallel coordinates{of}", about, plot_parallel_coordinate(study, **goal)
        about = "The value against each parameter; later trials are darker."
        yield f"Slices{of}", about, plot_slice(study, **goal)
    if not several and any(trial.intermediate_values for trial in study.trials):
        about = "Each trial's value after each epoch; those that were stopped early end early."
        yield "Curves", about, plot_intermediate_values(study)
    if any("core_seconds" in trial.user_attrs for trial in study.trials):
        yield "Cost", "Core-seconds of each trial.", _costs(study.trials)


def _value(i: int, trial: FrozenTrial) -> float:
    return trial.values[i]


COLOURS = {"COMPLETE": "#2f7d4f", "PRUNED": "#c9a227", "FAIL": "#b3413a"}


def _costs(trials: Sequence[FrozenTrial]) -> go.Figure:
    figure = go.Figure()
    for state, colour in COLOURS.items():
        some = [t for t in trials if t.state.name == state and "core_seconds" in t.user_attrs]
        figure.add_bar(
            x=[t.number for t in some],
            y=[t.user_attrs["core_seconds"] for t in some],
            name=state.lower(),
            marker_color=colour,
        )
    figure.update_layout(xaxis_title="Trial", yaxis_title="Core-seconds", barmode="stack")
    return figure


def _plotted(figure: go.Figure) -> str:
    figure.update_layout(template="plotly_white", title=None, margin={"t": 30, "r": 20, "b": 50, "l": 60})
    return figure.to_html(full_html=False, include_plotlyjs=False, default_height="420px")


def _facts(trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], objectives: Sequence[str]) -> str:
    counts = {state: sum(t.state.name == state for t in trials) for state in COLOURS}
    seconds = sum(t.user_attrs.get("core_seconds", 0.0) for t in trials)
    facts = {
        "trials": str(len(trials)),
        "complete": str(counts["COMPLETE"]),
        "pruned": str(counts["PRUNED"]),
        "failed": str(counts["FAIL"]),
        "core-hours": f"{seconds / 3600:.2f}",
    }
    if len(objectives) == 1 and best:
        facts = {f"best {objectives[0]}": f"{best[0].values[0]:.5g} (trial {best[0].number})"} | facts
    cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(cells)}</dl>"


def _table(trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], objectives: Sequence[str]) -> str:
    """All trials, the best first, then by number; with parameters, epochs, cost and what went wrong."""
    numbers = {trial.number for trial in best}
    order = sorted(trials, key=lambda trial: (trial.number not in numbers, trial.number))
    names = sorted({key for trial in trials for key in trial.params})
    header = ["trial", "state", *objectives, "epochs", "core-seconds", *names, ""]
    rows = []
    for trial in order:
        values = [f"{value:.5g}" for value in trial.values or []] or [""] * len(objectives)
        cost = trial.user_attrs.get("core_seconds")
        cells = [
            str(trial.number), trial.state.name.lower(), *values, str(trial.user_attrs.get("epochs", "")),
            "" if cost is None else f"{cost:.1f}", *(_shown(trial.params.get(name)) for name in names),
            trial.user_attrs.get("error", ""),
        ]  # fmt: skip
        kind = "best" if trial.number in numbers else "fail" if trial.state == TrialState.FAIL else ""
        rows.append(f"<tr class='{kind}'>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )
