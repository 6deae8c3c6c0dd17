import numpy as np
import pandas as pd
import pytest

from app.config import Project
from app.data.prepare import LABEL
from app.evaluation import metrics, predictions
from tests import bundles, texts


def rows(labels: list[int]) -> pd.DataFrame:
    towns = np.where(np.arange(len(labels)) % 3 == 0, None, "Bonn")
    return pd.DataFrame({"workclass": towns, "about": towns, LABEL: labels})


def test_a_binary_label_has_metrics_calibration_and_slices():
    project = Project.model_validate({**bundles.PROJECT, "evaluation": {"slices": ["workclass"]}})
    labels, probabilities = [0, 0, 1, 1, 0, 1], np.array([0.1, 0.6, 0.55, 0.9, 0.2, 0.4])
    evaluation = predictions.evaluate(project, rows(labels), probabilities)
    assert set(evaluation) == {"model", "reliability", "slices"}
    assert evaluation["model"] == metrics.evaluate_binary(np.array(labels), probabilities)
    assert sum(b["share"] for b in evaluation["reliability"]) == pytest.approx(1)
    by_town = evaluation["slices"]["workclass"]
    assert {town: slice_["rows"] for town, slice_ in by_town.items()} == {"Bonn": 4, "(missing)": 2}


def test_a_label_of_classes_has_the_metrics_of_each_too(tmp_path):
    project = Project.model_validate(texts.project(tmp_path))
    labels = [0, 1, 2, 2, 1, 0, 2]
    probabilities = np.eye(3)[[0, 1, 2, 1, 1, 2, 2]] * 0.7 + 0.1
    evaluation = predictions.evaluate(project, rows(labels), probabilities)
    assert set(evaluation) == {"model", "classes", "reliability", "slices"}
    assert list(evaluation["classes"]) == texts.CLASSES
    about = evaluation["slices"]["about"].values()
    mean = sum(slice_["rows"] * slice_["accuracy"] for slice_ in about) / len(labels)
    assert mean == pytest.approx(evaluation["model"]["accuracy"]) == pytest.approx(5 / 7)
    (confidence,) = evaluation["reliability"]
    assert confidence["predicted"] == pytest.approx(0.8)
    assert confidence["observed"] == pytest.approx(5 / 7)
