"""Metrics of parts of the test rows, which show where a model is worse."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from app.evaluation import metrics

MAX_VALUES = 20
"""Maximum number of values of a column with a slice each, the most frequent ones; the others share one."""
MISSING, OTHERS = "(missing)", "(others)"

Slices = dict[str, dict[str, dict[str, Any]]]
"""`rows` and the metrics, by column and value."""


def evaluate(
    frame: pd.DataFrame, columns: Sequence[str], metrics_of: Callable[[np.ndarray], dict[str, float | None]]
) -> Slices:
    """Evaluate the slices of some columns, the most frequent value first.

    `metrics_of` is called with a mask (rows,) of a slice and returns the metrics of its rows.
    """
    results: Slices = {}
    for column in columns:
        values = frame[column].astype(object).where(frame[column].notna(), MISSING)
        frequent = list(values.value_counts().index[:MAX_VALUES])
        values = values.where(values.isin(frequent), OTHERS)
        results[column] = {}
        for value in [*frequent, OTHERS]:
            mask = (values == value).to_numpy()
            if mask.any():
                results[column][value] = {"rows": int(mask.sum()), **metrics_of(mask)}
    return results


def evaluate_binary(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Metrics of a slice: the observed and predicted share of positives, AUC, accuracy and F1.

    `labels` (rows,) are 0 and 1, `probabilities` (rows,) those of 1. AUC is None if all labels are the same.
    """
    predicted = probabilities >= 0.5
    num_right = float(np.sum(predicted & (labels == 1)))
    return {
        "observed": float(labels.mean()),
        "predicted": float(probabilities.mean()),
        "auc": metrics.auc(labels, probabilities) if 0 < labels.mean() < 1 else None,
        "accuracy": float((predicted == labels).mean()),
        "f1": 2 * num_right / max(1.0, float(predicted.sum() + labels.sum())),
    }


def evaluate_classes(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Metrics of a slice: accuracy, and macro F1 over the classes that occur in it or are predicted.

    `labels` (rows,) are indices of classes, `probabilities` (rows, classes).
    """
    from sklearn.metrics import f1_score

    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
    }
