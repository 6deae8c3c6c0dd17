"""The evaluation of predictions of a label, with all that the card of a bundle shows."""

from typing import Any

import numpy as np
import pandas as pd

from app.config import Project
from app.data.prepare import LABEL
from app.evaluation import metrics, slices


def evaluate(project: Project, rows: pd.DataFrame, probabilities: np.ndarray) -> dict[str, Any]:
    """Evaluate predictions for rows of a prepared part.

    `probabilities` are those of the positive label, (rows,), or of each class, (rows, classes). Returns the
    metrics as `model`, the bins of the calibration as `reliability`, the metrics by slice as `slices`, and
    with several classes the metrics of each as `classes`.
    """
    labels = rows[LABEL].to_numpy()
    results: dict[str, Any]
    if classes := project.data.target.classes:
        evaluate_slice = slices.evaluate_classes
        is_right = (probabilities.argmax(axis=1) == labels).astype(float)
        results = {
            "model": metrics.evaluate_classes(labels, probabilities),
            "classes": dict(zip(classes, metrics.by_class(labels, probabilities), strict=True)),
            "reliability": metrics.reliability(is_right, probabilities.max(axis=1)),
        }
    else:
        evaluate_slice = slices.evaluate_binary
        results = {
            "model": metrics.evaluate_binary(labels, probabilities),
            "reliability": metrics.reliability(labels, probabilities),
        }
    by_slice = slices.evaluate(
        rows, project.evaluation.slices, lambda mask: evaluate_slice(labels[mask], probabilities[mask])
    )
    return {**results, "slices": by_slice}
