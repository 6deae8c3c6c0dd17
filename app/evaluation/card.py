"""The card of a bundle, in Markdown: what users should know before they use the model."""

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
"""Metrics that the card shows, of those that a model has."""


def render(project: Project, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Write the card.

    `summary` is the summary of the prepared data. `evaluation` holds `model` (metrics), `baselines` (metrics
    by name) and `reliability` (bins) as the bundle's metrics.json does, and `classes`, `slices` and
    `compression` if there are any. A recommender has no `reliability`.
    """
    source = project.data.source
    baselines = {name.replace("_", " "): metrics for name, metrics in evaluation["baselines"].items()}
    lines = [
        f"# {project.name}: {project.model.kind}",
        "",
        f"Predicts {_prediction(project)}.",
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
    for column, values in evaluation.get("slices", {}).items():
        names = list(next(iter(values.values())))
        lines += [f"By `{column}`:", "", *_metrics(values, names), ""]
    if compression := evaluation.get("compression"):
        lines += ["## Compression", "", *_compression(compression), ""]
    return "\n".join([*lines, *_inputs(project), ""])


def gate_section(passed: bool, reason: str) -> str:
    """The last section of the card: the gate's decision and its reason."""
    return f"## Gate\n\n{'Passed' if passed else 'Not passed'}: {reason}.\n"


def _inputs(project: Project) -> list[str]:
    if interactions := project.data.interactions:
        return [
            "The last item of each user was held out and ranked among all items that were new to the user.",
            "The baselines were fitted on the training and validation parts, this model on the",
            "training part only.",
            "",
            "## Inputs",
            "",
            f"- `{interactions.user}`: the user; items of the user in the training and validation parts are "
            "not recommended",
            "",
            "For an unknown user, the contract decides: an error, or the items that most users had.",
        ]
    return [
        "## Inputs",
        "",
        *(
            f"- `{name}`: {project.data.columns[name].type}, {encoding.encode}"
            for name, encoding in project.features.items()
        ),
        "",
        "For a category that training never saw, the column's contract decides: an error, or a prediction",
        "without this column. A missing number is replaced by the training mean.",
    ]


def _prediction(project: Project) -> str:
    if interactions := project.data.interactions:
        return f"which `{interactions.item}` a `{interactions.user}` takes next"
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


def _share(count: int, total: int) -> str:
    """A share in percent, or the count if the percentage would round to zero."""
    share = count / total
    return f"{share:.1%}" if share >= 0.001 else f"{count:,} of {total:,}"


def _compression(comparison: Mapping[str, Any]) -> list[str]:
    versions = comparison["before"], comparison["after"]
    rows = [
        ["size of the graph", *(f"{version['bytes'] / 1e6:.2f} MB" for version in versions)],
        ["median time of 1 row", *(f"{version['ms_1']:.2f} ms" for version in versions)],
        ["median time of 32 rows", *(f"{version['ms_32']:.2f} ms" for version in versions)],
        [f"test {comparison['metric']}", *(f"{version['score']:.4f}" for version in versions)],
    ]
    return [
        f"In int8, quantised by ONNX Runtime. {comparison['changed']:.1%} of test predictions changed.",
        "",
        *_table(["", "before", "after"], rows),
    ]


def _metrics(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str] = COLUMNS) -> list[str]:
    """A table with a row for each model, class or slice, and a column for each metric of the first one."""
    columns = [name for name in names if name in next(iter(rows.values()))]
    header = ["", *(name.replace("_", " ") for name in columns)]
    return _table(header, ([label, *(_figure(values, n) for n in columns)] for label, values in rows.items()))


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name)
    if value is None:
        return "-"
    return f"{value:,.0f}" if name == "rows" else f"{value:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
