"""The champion beside a candidate: on rows that neither learnt from, or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from app.bundle.bundle import Bundle
from app.config import Project
from app.config.gate import RATING_METRICS
from app.data import split
from app.data.prepare import LABEL, Prepared

MIN_ROWS = 200
"""Fewest test rows to compare on, where some of the test part have to be left out."""
MIN_ROWS_PER_LABEL = 10
"""Fewest of them with each label."""

Metrics = Mapping[str, float]
Evaluate = Callable[[Bundle, np.ndarray], Metrics]
"""The metrics of a bundle on those rows of the test part where a mask (rows,) is true."""


@dataclass(frozen=True)
class Comparison:
    """Candidate and champion on the same test rows, none of which either learnt from."""

    candidate: Metrics
    champion: Metrics
    num_rows: int
    num_test_rows: int
    """Rows of the candidate's test part, which `num_rows` are of."""


@dataclass(frozen=True)
class NotComparable:
    """There is a champion, but nothing to compare it on."""

    reason: str


def compare(
    prepared: Prepared, candidate: Bundle, champion: Bundle, evaluate: Evaluate
) -> Comparison | NotComparable:
    """Evaluate both on the rows of the candidate's test part that the champion did not learn from either."""
    project = _project(candidate.path)
    try:
        theirs = _project(champion.path)
    except (FileNotFoundError, ValidationError):
        return NotComparable("this release cannot read the champion's project.json")
    if faults := differences(project, theirs):
        return NotComparable(f"its contract is another one: {'; '.join(faults)}")
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


def differences(ours: Project, theirs: Project) -> list[str]:
    """What keeps two projects' models from being compared, in words; empty if nothing does.

    The champion must predict the same, and read each of its columns as the candidate's data have it.
    """
    faults = []
    for section in ("label", "interactions"):
        now, before = (getattr(project.data, section) for project in (ours, theirs))
        if (now is None) != (before is None):
            return [f"data.{section} was {'not ' if before is None else ''}given"]
        if now is None:
            continue
        names = ("column", "positive", "above", "classes") if section == "label" else ("user", "item")
        if section == "interactions" and ours.gate.metric in RATING_METRICS:  # they are of this column
            names = (*names, "rating")
        for name in names:
            old, new = getattr(before, name), getattr(now, name)
            if old != new:
                faults.append(f"data.{section}.{name} was {old!r} and is {new!r}")
    if ours.gate.metric not in theirs.model.test_metrics:
        faults.append(f"its model has no {ours.gate.metric}")
    if (now := sorted(ours.data.missing)) != (before := sorted(theirs.data.missing)):
        faults.append(f"data.missing was {before} and is {now}")
    for name in theirs.features:
        before, now = theirs.data.columns[name].type, ours.data.columns.get(name)
        if now is None:
            faults.append(f"its input {name!r} is no longer in data.columns")
        elif now.type != before:
            faults.append(f"its input {name!r} was a {before} and is a {now.type}")
    return faults


def unseen(project: Project, prepared: Prepared, champion: Bundle) -> np.ndarray | NotComparable:
    """Which rows of the test part the champion did not learn from, bool (rows,)."""
    partition = split.partition_at(champion.path)
    if partition is None:
        return NotComparable("its bundle does not say which rows it was trained on")
    if fault := partition.obstacle(project.data):
        return NotComparable(fault)
    return partition.unseen(prepared.frame("test"), champion.path)


def _too_few(rows: np.ndarray, labels: np.ndarray) -> str:
    """Why rows are too few to compare on; empty if they are enough."""
    seen = f"the champion was trained on {1 - rows.mean():.0%} of the {len(rows):,} test rows"
    if rows.sum() < MIN_ROWS:
        return f"{seen}; {rows.sum():,} are left, and a comparison needs {MIN_ROWS}"
    for label in np.unique(labels):
        count = int((labels[rows] == label).sum())
        if count < min(MIN_ROWS_PER_LABEL, (labels == label).sum()):
            return f"{seen}; {count} with some label are left, and a comparison needs {MIN_ROWS_PER_LABEL}"
    return ""
