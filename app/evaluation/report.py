"""The card of a bundle: what a person should know before using the model."""

from collections.abc import Mapping
from typing import Any

from app.config import Project

COLUMNS = ("auc", "accuracy", "precision", "recall", "f1", "brier", "calibration_error")


def card(project: Project, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The card in Markdown.

    `summary` is the prepared data's; `evaluation` has `model`, `baselines` (metrics by name) and
    `reliability` (bins), as in the bundle's metrics.json.
    """
    parts = summary["parts"]
    source = project.data.source
    rows = {"model": evaluation["model"], **evaluation["baselines"]}
    table = [
        "| | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, metrics in rows.items():
        label = "**this model**" if name == "model" else name.replace("_", " ")
        table.append(f"| {label} | " + " | ".join(f"{metrics[c]:.4f}" for c in COLUMNS) + " |")
    bins = ["| predicted | observed | share of rows |", "|---|---|---|"]
    bins += [
        f"| {b['predicted']:.3f} | {b['observed']:.3f} | {b['share']:.3f} |"
        for b in evaluation["reliability"]
    ]
    inputs = [
        f"- `{name}`: {project.data.columns[name].type}, {e.encode}" for name, e in project.features.items()
    ]
    lines = [
        f"# {project.name}: {project.model.kind}",
        "",
        f"Predicts the probability that `{project.data.label.column}` is `{project.data.label.positive}`.",
        "",
        "## Data",
        "",
        f"- source: {f'sample {source.sample}' if source.sample else source.path}",
        f"- version: `{summary['data_version']}`",
        *(f"- {name}: {p['rows']:,} rows, {p['positive']:.1%} positive" for name, p in parts.items()),
        "",
        "## Quality on the test part",
        "",
        *table,
        "",
        "Calibration, by predicted probability:",
        "",
        *bins,
        "",
        "## Inputs",
        "",
        *inputs,
        "",
        "A category never seen in training is refused or left out, as the contract says of each column;",
        "a missing number stands at the training mean.",
        "",
    ]
    return "\n".join(lines)
