"""The card of a bundle: what a person should know before using the model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.config import Project
from app.config.gate import BINARY_METRICS, CLASS_METRICS, RANKING_METRICS, RATING_METRICS

COLUMNS = tuple(
    dict.fromkeys(
        [
            *(*BINARY_METRICS, *CLASS_METRICS, "brier", "calibration_error"),
            *(*RANKING_METRICS, "rmse", *RATING_METRICS),
        ]
    )
)
"""Metrics that stand in the card, where a model has them."""


def card(project: Project, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The card in Markdown.

    `summary` is the prepared data's; `evaluation` has `model`, `baselines` (metrics by name) and
    `reliability` (bins), as in the bundle's metrics.json, and `classes`, `slices` and `compression` if there
    are. A recommender has no `reliability`.
    """
    source = project.data.source
    baselines = {name.replace("_", " "): found for name, found in evaluation["baselines"].items()}
    lines = [
        f"# {project.name}: {project.model.kind}",
        "",
        f"Predicts {_predicts(project)}.",
        "",
        "## Data",
        "",
        f"- source: {f'sample {source.sample}' if source.sample else source.path}",
        f"- version: `{summary['data_version']}`",
        *(f"- {name}: {_part(part, project)}" for name, part in summary["parts"].items()),
        "",
        "## Quality on the test part",
        "",
        *_metrics({"**this model**": evaluation["model"], **baselines}),
        "",
    ]
    if "classes" in evaluation:
        lines += [
            "By class:",
            "",
            *_metrics(evaluation["classes"], ("rows", "precision", "recall", "f1")),
            "",
        ]
    if "reliability" in evaluation:
        lines += [
            "Calibration, by predicted probability:",
            "",
            *_table(
                ["predicted", "observed", "share of rows"],
                (
                    [f"{b['predicted']:.3f}", f"{b['observed']:.3f}", f"{b['share']:.3f}"]
                    for b in evaluation["reliability"]
                ),
            ),
            "",
        ]
    for column, found in evaluation.get("slices", {}).items():
        names = list(next(iter(found.values())))
        lines += [f"By `{column}`:", "", *_metrics(found, names), ""]
    if compression := evaluation.get("compression"):
        lines += ["## Compression", "", *_compression(compression), ""]
    return "\n".join([*lines, *_inputs(project), ""])


def verdict(passed: bool, reason: str) -> str:
    """The card's last section: what the gate decided, and why."""
    return f"## Gate\n\n{'Passed' if passed else 'Not passed'}: {reason}.\n"


def _inputs(project: Project) -> list[str]:
    if of := project.data.interactions:
        return [
            "Each user's last item was held out and ranked among all that the user has not had, by what came",
            "before it. The baselines were fitted on the training and the validation part, this model on the",
            "training part alone.",
            "",
            "## Inputs",
            "",
            f"- `{of.user}`: who; items that the user had in the training and validation parts are left out",
            "",
            "Who is not known is refused, or gets the items that most users had, as the contract says.",
        ]
    return [
        "## Inputs",
        "",
        *(
            f"- `{name}`: {project.data.columns[name].type}, {e.encode}"
            for name, e in project.features.items()
        ),
        "",
        "A category never seen in training is refused or left out, as the contract says of each column;",
        "a missing number stands at the training mean.",
    ]


def _predicts(project: Project) -> str:
    if of := project.data.interactions:
        return f"which `{of.item}` a `{of.user}` takes next"
    label = project.data.target
    if label.classes is None:
        return f"the probability that `{label.column}` is `{label.outcome}`"
    return f"the probabilities that `{label.column}` is {', '.join(f'`{c}`' for c in label.classes)}"


def _part(part: Mapping[str, Any], project: Project) -> str:
    rows = f"{part['rows']:,} rows"
    if "users" in part:
        return f"{rows} of {part['users']:,} users"
    classes = project.data.target.classes
    if classes is None:
        return f"{rows}, {_share(part['counts'][1], part['rows'])} positive"
    shares = [f"{_share(n, part['rows'])} {name}" for name, n in zip(classes, part["counts"], strict=True)]
    return f"{rows}, {', '.join(shares)}"


def _share(count: int, of: int) -> str:
    """A share in percent; small ones as counts, which would round to nothing."""
    share = count / of
    return f"{share:.1%}" if share >= 0.001 else f"{count:,} of {of:,}"


def _compression(found: Mapping[str, Any]) -> list[str]:
    before, after = found["before"], found["after"]
    rows = [
        ["size of the graph", *(f"{f['bytes'] / 1e6:.2f} MB" for f in (before, after))],
        ["median time of 1 row", *(f"{f['ms_1']:.2f} ms" for f in (before, after))],
        ["median time of 32 rows", *(f"{f['ms_32']:.2f} ms" for f in (before, after))],
        [f"test {found['metric']}", *(f"{f['score']:.4f}" for f in (before, after))],
    ]
    return [
        f"In int8, quantised by ONNX Runtime. {found['changed']:.1%} of the test part's answers are others.",
        "",
        *_table(["", "before", "after"], rows),
    ]


def _metrics(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str] = COLUMNS) -> list[str]:
    """A table of metrics: a row for each model, class or slice, a column for each that the first one has."""
    shown = [name for name in names if name in next(iter(rows.values()))]
    header = ["", *(name.replace("_", " ") for name in shown)]
    return _table(header, ([label, *(_figure(m, n) for n in shown)] for label, m in rows.items()))


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name)
    if value is None:
        return "-"
    return f"{value:,.0f}" if name == "rows" else f"{value:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
