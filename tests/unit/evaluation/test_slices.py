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
    found = slices.evaluate(frame, ["town"], lambda rows: {"first": float(rows.argmax())})
    assert found == {
        "town": {
            "a": {"rows": 3, "first": 0},
            "(missing)": {"rows": 2, "first": 1},
            "b": {"rows": 1, "first": 3},
        }
    }


def test_rare_values_are_taken_together():
    frame = pd.DataFrame({"id": [f"{i:03}" for i in range(50)] + ["often"] * 5})
    found = slices.evaluate(frame, ["id"], lambda rows: {})["id"]
    assert len(found) == slices.MAX_VALUES + 1
    assert found["often"] == {"rows": 5}
    assert found[slices.OTHERS]["rows"] == 55 - 5 - (slices.MAX_VALUES - 1)


def test_a_binary_slice_tells_what_was_predicted_beside_what_was():
    labels, probabilities = np.array([1, 0, 1, 0]), np.array([0.9, 0.2, 0.4, 0.6])
    found = slices.evaluate_binary(labels, probabilities)
    assert found == {
        "observed": 0.5,
        "predicted": pytest.approx(0.525),
        "auc": 0.75,
        "accuracy": 0.5,
        "f1": 0.5,
    }


def test_a_slice_with_one_label_alone_has_no_auc():
    assert slices.evaluate_binary(np.zeros(3), np.array([0.1, 0.2, 0.9]))["auc"] is None


def test_a_slice_of_classes_counts_those_that_occur_in_it():
    found = slices.evaluate_classes(LABELS[:2], PROBABILITIES[:2])
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 0) / 2)}


def test_metrics_of_classes_are_the_means_over_them():
    found = evaluate_classes(LABELS, PROBABILITIES)
    f1 = [2 * 1 / (2 + 2), 2 * 1 / (2 + 1), 2 * 2 / (2 + 3)]
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["macro_f1"] == pytest.approx(np.mean(f1)) == macro_f1(LABELS, PROBABILITIES)
    assert found["macro_recall"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.8, 0.3, 0.7, 0.8, 0.4, 0.7]).mean())
    brier = ((PROBABILITIES - np.eye(3)[LABELS]) ** 2).sum(axis=1).mean()
    assert found["brier"] == pytest.approx(brier)
    assert 0 <= found["calibration_error"] <= 1


def test_each_class_has_its_own():
    first, second, third = by_class(LABELS, PROBABILITIES)
    assert first == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert second["recall"] == 1
    assert third["rows"] == 3


def test_a_class_that_is_never_predicted_counts_as_zero():
    constant = np.tile([0.2, 0.3, 0.5], (6, 1))
    assert macro_f1(LABELS, constant) == pytest.approx((2 * 3 / (3 + 6)) / 3)
