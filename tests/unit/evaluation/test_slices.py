import numpy as np
import pandas as pd
import pytest

from app.evaluation import slices
from app.evaluation.metrics import by_class, evaluate_classes, macro_f1

LABELS = np.array([0, 0, 1, 2, 2, 2])
PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.5, 0.1, 0.4], [0.1, 0.2, 0.7]]
)


def test_every_value_of_a_column_is_a_slice_and_missing_is_one():
    frame = pd.DataFrame({"town": ["a", None, "a", "b", "a", None]})
    results = slices.evaluate(frame, ["town"], lambda rows: {"first": float(rows.argmax())})
    assert results == {
        "town": {
            "a": {"rows": 3, "first": 0},
            "(missing)": {"rows": 2, "first": 1},
            "b": {"rows": 1, "first": 3},
        }
    }


def test_rare_values_form_one_slice():
    frame = pd.DataFrame({"id": [f"{i:03}" for i in range(50)] + ["often"] * 5})
    results = slices.evaluate(frame, ["id"], lambda rows: {})["id"]
    assert len(results) == slices.MAX_VALUES + 1
    assert results["often"] == {"rows": 5}
    assert results[slices.OTHERS]["rows"] == 55 - 5 - (slices.MAX_VALUES - 1)


def test_a_binary_slice_has_the_predicted_and_the_observed_share():
    labels, probabilities = np.array([1, 0, 1, 0]), np.array([0.9, 0.2, 0.4, 0.6])
    results = slices.evaluate_binary(labels, probabilities)
    assert results == {
        "observed": 0.5,
        "predicted": pytest.approx(0.525),
        "auc": 0.75,
        "accuracy": 0.5,
        "f1": 0.5,
    }


def test_a_slice_with_one_label_has_no_auc():
    assert slices.evaluate_binary(np.zeros(3), np.array([0.1, 0.2, 0.9]))["auc"] is None


def test_a_slice_of_classes_counts_those_that_occur_in_it():
    results = slices.evaluate_classes(LABELS[:2], PROBABILITIES[:2])
    assert results == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 0) / 2)}


def test_metrics_of_classes_are_the_means_over_them():
    results = evaluate_classes(LABELS, PROBABILITIES)
    f1 = [2 * 1 / (2 + 2), 2 * 1 / (2 + 1), 2 * 2 / (2 + 3)]
    assert results["accuracy"] == pytest.approx(4 / 6)
    assert results["macro_f1"] == pytest.approx(np.mean(f1)) == macro_f1(LABELS, PROBABILITIES)
    assert results["macro_recall"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert results["log_loss"] == pytest.approx(-np.log([0.8, 0.3, 0.7, 0.8, 0.4, 0.7]).mean())
    brier = ((PROBABILITIES - np.eye(3)[LABELS]) ** 2).sum(axis=1).mean()
    assert results["brier"] == pytest.approx(brier)
    assert 0 <= results["calibration_error"] <= 1


def test_every_class_has_its_own_metrics():
    first, second, third = by_class(LABELS, PROBABILITIES)
    assert first == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert second["recall"] == 1
    assert third["rows"] == 3


def test_a_class_that_is_never_predicted_counts_as_zero():
    constant = np.tile([0.2, 0.3, 0.5], (6, 1))
    assert macro_f1(LABELS, constant) == pytest.approx((2 * 3 / (3 + 6)) / 3)
