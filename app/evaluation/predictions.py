"""Everything that a bundle's card says about predictions of a label."""

from typing import Any

import numpy as np
import pandas as pd

from app.config import Project
from app.data.prepare import LABEL
from app.evaluation import metrics, slices


def evaluate(project: Project, rows: pd.DataFrame, probabilities: np.ndarray) -> dict[str, Any]:
    """Evaluate predictions for rows of a prepared part.

    `probabilities` are those of the positive label, (rows,), or of each class, (rows, classes). Returns the
    metrics as `model`, calibration bins as `reliability`, metrics by slice as `slices`, and with several
    classes the metrics of each as `classes`.
    """
    labels = rows[LABEL].to_numpy()
    results: dict[str, Any]
    if classes := project.data.target.classes:
        is_right = (probabilities.argmax(axis=1) == labels).astype(float)
        results = {
            "model": metrics.evaluate_classes(labels, probabilities),
            "classes": dict(zip(classes, metrics.by_class(labels, probabilities), strict=True)),
            "reliability": metrics.reliability(is_right, probabilities.max(axis=1)),
        }
    else:
        results = {
            "model": metrics.evaluate(labels, probabilities),
            "reliability": metrics.reliability(labels, probabilities),
        }
    of_slice = slices.of_classes if classes else slices.of_binary
    results["slices"] = slices.slices(
        rows, project.evaluation.slices, lambda mask: of_slice(labels[mask], probabilities[mask])
    )
    return results
