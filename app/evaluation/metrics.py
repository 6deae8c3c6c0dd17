"""Metrics of predicted probabilities, for a binary label and for a label of several classes."""

from typing import Any

import numpy as np

NUM_BINS = 10


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve. `labels` (rows,) are 0 and 1, and both must occur; `scores` (rows,) may have
    any monotone scale."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def evaluate_binary(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5
) -> dict[str, float]:
    """AUC, log loss, Brier score, expected calibration error, and the metrics of the decision at `threshold`.

    `labels` (rows,) are 0 and 1, `probabilities` (rows,) those of 1. Precision and F1 are 0 if no row is
    predicted positive.
    """
    from sklearn import metrics

    predicted = probabilities >= threshold
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, average="binary", zero_division=0
    )
    return {
        "auc": auc(labels, probabilities),
        "accuracy": float((predicted == labels).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "log_loss": float(metrics.log_loss(labels, probabilities)),
        "brier": float(np.mean((probabilities - labels) ** 2)),
        "calibration_error": calibration_error(labels, probabilities),
    }


def evaluate_classes(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, macro precision, recall and F1, log loss, Brier score (summed over the classes), and the
    expected calibration error of the predicted class.

    `labels` (rows,) are indices of classes, `probabilities` (rows, classes). A macro metric is the mean over
    the classes; a class without rows counts as 0.
    """
    scores = by_class(labels, probabilities)
    is_right = probabilities.argmax(axis=1) == labels
    of_label = probabilities[np.arange(len(labels)), labels]
    indicators = np.eye(probabilities.shape[1])[labels]
    return {
        "accuracy": float(is_right.mean()),
        **{
            f"macro_{name}": float(np.mean([score[name] for score in scores]))
            for name in ("precision", "recall", "f1")
        },
        "log_loss": float(-np.log(np.clip(of_label, 1e-15, 1)).mean()),
        "brier": float(((probabilities - indicators) ** 2).sum(axis=1).mean()),
        "calibration_error": calibration_error(is_right.astype(float), probabilities.max(axis=1)),
    }


def macro_f1(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean of the classes' F1; `labels` (rows,) and `probabilities` (rows, classes)."""
    return float(np.mean([score["f1"] for score in by_class(labels, probabilities)]))


def by_class(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Precision, recall, F1 and number of rows of each class; `labels` (rows,), `probabilities` (rows,
    classes)."""
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    num_rows, num_predicted, num_right = (
        np.bincount(classes, minlength=num_classes)
        for classes in (labels, predicted, labels[predicted == labels])
    )
    return [
        {
            "precision": float(right / max(1, predictions)),
            "recall": float(right / max(1, rows)),
            "f1": float(2 * right / max(1, predictions + rows)),
            "rows": float(rows),
        }
        for right, predictions, rows in zip(num_right, num_predicted, num_rows, strict=True)
    ]


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error (Naeini et al., 2015): the mean distance between predicted and observed rate
    over the bins of `reliability`, weighted by their rows."""
    bins = reliability(labels, probabilities)
    return float(sum(b["share"] * abs(b["predicted"] - b["observed"]) for b in bins))


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Bins of equal width over 0..1 that have rows: number of the bin, share of the rows, mean prediction and
    observed rate. `labels` (rows,) are 0 and 1, `probabilities` (rows,) those of 1."""
    bins = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    rows = []
    for number in np.unique(bins):
        is_inside = bins == number
        rows.append(
            {
                "bin": int(number),
                "share": float(is_inside.mean()),
                "predicted": float(probabilities[is_inside].mean()),
                "observed": float(labels[is_inside].mean()),
            }
        )
    return rows
