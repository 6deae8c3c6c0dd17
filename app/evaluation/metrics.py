"""How good the probabilities of a binary outcome are."""

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
