import numpy as np
import pytest
import sklearn.metrics as sklearn_metrics

from app.config import BINARY_METRICS
from app.evaluation.metrics import auc, evaluate_binary, reliability


def predictions(seed: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    probabilities = random.beta(0.7, 1.2, count).astype(np.float32)
    return (random.random(count) < probabilities**1.3).astype(np.float32), probabilities


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_metrics_agree_with_scikit_learn(seed, threshold):
    labels, probabilities = predictions(seed)
    predicted = probabilities >= threshold
    results = evaluate_binary(labels, probabilities, threshold)
    expected = {
        "auc": sklearn_metrics.roc_auc_score(labels, probabilities),
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        "precision": sklearn_metrics.precision_score(labels, predicted),
        "recall": sklearn_metrics.recall_score(labels, predicted),
        "f1": sklearn_metrics.f1_score(labels, predicted),
        "log_loss": sklearn_metrics.log_loss(labels, probabilities),
        "brier": sklearn_metrics.brier_score_loss(labels, probabilities),
    }
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_metrics_agree_with_values_by_hand():
    results = evaluate_binary(np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.5, 0.9]))
    assert results == pytest.approx(
        {
            "auc": 3 / 4,  # 0.5 is below 0.6, the other three pairs are in order
            "accuracy": 3 / 4,  # 0.5 counts as positive
            "precision": 2 / 3,
            "recall": 1,
            "f1": 4 / 5,
            "log_loss": -np.log([0.9, 0.4, 0.5, 0.9]).mean(),
            "brier": (0.01 + 0.36 + 0.25 + 0.01) / 4,
            "calibration_error": (0.1 + 0.6 + 0.5 + 0.1) / 4,
        }
    )


def test_without_a_positive_prediction_precision_and_f1_are_0():
    results = evaluate_binary(np.array([0, 1]), np.array([0.1, 0.2]))
    assert (results["precision"], results["recall"], results["f1"], results["accuracy"]) == (0, 0, 0, 0.5)


def test_every_metric_of_the_gate_is_a_plain_float():
    results = evaluate_binary(*predictions(0))
    assert set(BINARY_METRICS) <= set(results)
    assert {type(value) for value in results.values()} == {float}


def test_auc_does_not_depend_on_the_scale():
    labels, probabilities = predictions(0)
    logits = np.log(probabilities) - np.log1p(-probabilities)
    assert auc(labels, logits) == pytest.approx(auc(labels, probabilities), abs=1e-3)
    assert auc(labels, -probabilities) == pytest.approx(1 - auc(labels, probabilities))


def test_certain_and_right_predictions_are_perfect():
    labels = np.array([0.0, 1.0, 1.0])
    results = evaluate_binary(labels, labels)
    assert [results[n] for n in BINARY_METRICS] == [1.0] * 5
    assert (results["brier"], results["calibration_error"]) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_the_bins_sum_to_1_and_their_weighted_means_to_the_overall_means(seed):
    labels, probabilities = predictions(seed)
    bins = reliability(labels, probabilities)
    assert sum(b["share"] for b in bins) == pytest.approx(1)
    assert sum(b["share"] * b["predicted"] for b in bins) == pytest.approx(probabilities.mean(), abs=1e-6)
    assert sum(b["share"] * b["observed"] for b in bins) == pytest.approx(labels.mean(), abs=1e-6)
    assert all(b["bin"] / 10 <= b["predicted"] <= (b["bin"] + 1) / 10 for b in bins)


def test_the_ends_of_the_scale_have_bins():
    bins = reliability(np.array([0, 1]), np.array([0.0, 1.0]))
    assert [(b["bin"], b["share"], b["observed"]) for b in bins] == [(0, 0.5, 0.0), (9, 0.5, 1.0)]
