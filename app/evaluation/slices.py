"""The same metrics for parts of the test rows: whom does the model serve worse?"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

MAX_VALUES = 20
"""Values of a column that stand alone, the most frequent ones; the others are taken together."""
MISSING, OTHERS = "(missing)", "(others)"

Slices = dict[str, dict[str, dict[str, Any]]]
"""By column and value: `rows` and the metrics."""


def slices(
    frame: pd.DataFrame, columns: Sequence[str], evaluate: Callable[[np.ndarray], dict[str, float | None]]
) -> Slices:
    """`evaluate` is given the rows of a slice as a mask (rows,), and gives its metrics; most rows first."""
    found: Slices = {}
    for column in columns:
        values = frame[column].astype(object).where(frame[column].notna(), MISSING)
        frequent = list(values.value_counts().index[:MAX_VALUES])
        values = values.where(values.isin(frequent), OTHERS)
        found[column] = {}
        for value in [*frequent, OTHERS]:
            rows = (values == value).to_numpy()
            if rows.any():
                found[column][value] = {"rows": int(rows.sum()), **evaluate(rows)}
    return found


def of_binary(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Of one slice: the share of positives, predicted and observed, and how they fit.

    `labels` (rows,) of 0 and 1, `probabilities` (rows,) of 1. AUC is None where all labels are the same.
    """
    from app.evaluation import metrics

    predicted = probabilities >= 0.5
    right = float(np.sum(predicted & (labels == 1)))
    return {
        "observed": float(labels.mean()),
        "predicted": float(probabilities.mean()),
        "auc": metrics.auc(labels, probabilities) if 0 < labels.mean() < 1 else None,
        "accuracy": float((predicted == labels).mean()),
        "f1": 2 * right / max(1.0, float(predicted.sum() + labels.sum())),
    }


def of_classes(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Of one slice; macro F1 is over the classes that occur in it or are predicted.

    `labels` (rows,) places of classes, `probabilities` (rows, classes).
    """
    from sklearn.metrics import f1_score

    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
    }
