"""The comparison of a candidate with the champion, on rows that neither was trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from app.bundle.bundle import Bundle
from app.config import Project
from app.config.gate import RATING_METRICS
from app.data.partition import read_partition
from app.data.prepare import LABEL, Prepared

MIN_ROWS = 200
"""Minimum number of rows for a comparison on a part of the test rows."""
MIN_ROWS_PER_LABEL = 10
"""Minimum number of rows with each label in such a comparison; fewer if the test part has fewer."""

Metrics = Mapping[str, float]
Evaluate = Callable[[Bundle, np.ndarray], Metrics]
"""Computes the metrics of a bundle on the test rows where a mask (rows,) is true."""


@dataclass(frozen=True)
class Comparison:
    """Metrics of candidate and champion on the same test rows, on which neither was trained."""

    candidate: Metrics
    champion: Metrics
    num_rows: int
    num_test_rows: int
    """Number of rows in the candidate's test part, of which `num_rows` were compared."""


@dataclass(frozen=True)
class NotComparable:
    """There is a champion, but it cannot be compared with the candidate."""

    reason: str


def compare(
    prepared: Prepared, candidate: Bundle, champion: Bundle, evaluate: Evaluate
) -> Comparison | NotComparable:
    """Evaluate both on those rows of the candidate's test part on which the champion was not trained."""
    project = _project(candidate.path)
    try:
        champions_project = _project(champion.path)
    except (FileNotFoundError, ValidationError):
        return NotComparable("this release cannot read the champion's project.json")
    if faults := differences(project, champions_project):
        return NotComparable(f"its contract differs: {'; '.join(faults)}")
    test = prepared.frame("test")
    rows = unseen(project, prepared, champion)
    if isinstance(rows, NotComparable):
        return rows
    if not rows.all():
        labels = test[LABEL].to_numpy() if LABEL in test else np.zeros(len(test))
        if fault := _too_few(rows, labels):
            return NotComparable(fault)
    return Comparison(
        evaluate(candidate, rows), evaluate(champion, rows), num_rows=int(rows.sum()), num_test_rows=len(rows)
    )


def _project(path: Path) -> Project:
    return Project.model_validate_json((path / "project.json").read_text())


def differences(candidate: Project, champion: Project) -> list[str]:
    """Reasons why the models of two projects cannot be compared, one line each; empty if they can.

    The champion must predict the same label or interactions and have the gate's metric, and each of its
    inputs must have the same type in the candidate's data.
    """
    faults = []
    by_rating = candidate.gate.metric in RATING_METRICS
    for section in ("label", "interactions"):
        ours, champions = (getattr(project.data, section) for project in (candidate, champion))
        if (ours is None) != (champions is None):
            return [f"data.{section} was {'not ' if champions is None else ''}given"]
        if ours is None:
            continue
        keys = ("column", "positive", "above", "classes") if section == "label" else ("user", "item")
        if section == "interactions" and by_rating:
            keys = (*keys, "rating")
        for key in keys:
            old, new = getattr(champions, key), getattr(ours, key)
            if old != new:
                faults.append(f"data.{section}.{key} was {old!r} and is {new!r}")
    if candidate.gate.metric not in champion.model.test_metrics:
        faults.append(f"its model has no {candidate.gate.metric}")
    if (new := sorted(candidate.data.missing)) != (old := sorted(champion.data.missing)):
        faults.append(f"data.missing was {old} and is {new}")
    for name in champion.features:
        old_type, column = champion.data.columns[name].type, candidate.data.columns.get(name)
        if column is None:
            faults.append(f"its input {name!r} is no longer in data.columns")
        elif column.type != old_type:
            faults.append(f"its input {name!r} was a {old_type} and is a {column.type}")
    return faults


def unseen(project: Project, prepared: Prepared, champion: Bundle) -> np.ndarray | NotComparable:
    """Mask of the rows of the test part on which the champion was not trained, bool (rows,)."""
    partition = read_partition(champion.path)
    if partition is None:
        return NotComparable("its bundle has no record of the rows on which it was trained")
    if fault := partition.obstacle(project.data):
        return NotComparable(fault)
    return partition.unseen(prepared.frame("test"), champion.path)


def _too_few(rows: np.ndarray, labels: np.ndarray) -> str:
    """The reason why the rows of a mask are too few for a comparison; empty if they are enough."""
    seen = f"the champion was trained on {1 - rows.mean():.0%} of the {len(rows):,} test rows"
    if rows.sum() < MIN_ROWS:
        return f"{seen}; {rows.sum():,} are left, and a comparison needs {MIN_ROWS}"
    for label in np.unique(labels):
        count = int((labels[rows] == label).sum())
        if count < min(MIN_ROWS_PER_LABEL, (labels == label).sum()):
            return f"{seen}; {count} with some label are left, and a comparison needs {MIN_ROWS_PER_LABEL}"
    return ""
