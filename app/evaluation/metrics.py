"""How good probabilities are: of a binary outcome, or of several classes."""

from typing import Any

import numpy as np

NUM_BINS = 10


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; `scores` (rows,) in any monotone scale. Labels must not be constant."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def evaluate(labels: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """AUC, log loss, Brier score, expected calibration error, and what follows at the threshold.

    `labels` (rows,) of 0 and 1, `probabilities` (rows,) of 1. Where nothing is predicted positive,
    precision and F1 are 0.
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
        "calibration_error": sum(
            b["share"] * abs(b["predicted"] - b["observed"]) for b in reliability(labels, probabilities)
        ),
    }


def macro_f1(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean of the classes' F1, each counting the same; `probabilities` (rows, classes)."""
    return evaluate_classes(labels, probabilities)["macro_f1"]


def evaluate_classes(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, the means over the classes of precision, recall and F1, log loss, Brier score (summed over
    the classes), and the expected calibration error of the class that is predicted.

    `labels` (rows,) places of classes, `probabilities` (rows, classes). What has no rows counts as 0.
    """
    scores = by_class(labels, probabilities)
    rows = np.arange(len(labels))
    right = probabilities.argmax(axis=1) == labels
    found = {
        "accuracy": float(right.mean()),
        **{f"macro_{k}": float(np.mean([s[k] for s in scores])) for k in ("precision", "recall", "f1")},
        "log_loss": float(-np.log(np.clip(probabilities[rows, labels], 1e-15, 1)).mean()),
    }
    indicators = np.eye(probabilities.shape[1])[labels]
    found["brier"] = float(((probabilities - indicators) ** 2).sum(axis=1).mean())
    bins = reliability(right.astype(float), probabilities.max(axis=1))
    found["calibration_error"] = sum(b["share"] * abs(b["predicted"] - b["observed"]) for b in bins)
    return found


def by_class(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Rows, precision, recall and F1 of each class."""
    size = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    rows, given = (np.bincount(of, minlength=size) for of in (labels, predicted))
    right = np.bincount(labels[predicted == labels], minlength=size)
    return [
        {
            "precision": float(r / max(1, g)),
            "recall": float(r / max(1, n)),
            "f1": float(2 * r / max(1, g + n)),
            "rows": float(n),
        }
        for r, g, n in zip(right, given, rows, strict=True)
    ]


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Bins of equal width over 0..1 with their share of the rows, mean prediction and observed rate.

    The expected calibration error (Naeini et al., 2015) is the share-weighted distance of the two.
    """
    bins = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    rows = []
    for i in np.unique(bins):
        inside = bins == i
        rows.append(
            {
                "bin": int(i),
                "share": float(inside.mean()),
                "predicted": float(probabilities[inside].mean()),
                "observed": float(labels[inside].mean()),
            }
        )
    return rows
