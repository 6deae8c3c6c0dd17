import copy

import numpy as np
import pandas as pd

from app.config import Project
from app.data.prepare import LABEL
from app.evaluation import predictions
from app.evaluation.card import render
from app.evaluation.metrics import evaluate_binary, reliability
from tests import texts
from tests.bundles import PROJECT

LABELS = np.array([0, 0, 1, 1, 0])
MODEL, CONSTANT = np.array([0.1, 0.6, 0.55, 0.9, 0.2]), np.full(5, 0.4)
SUMMARY = {
    "data_version": "c0ffee" * 8,
    "parts": {
        "train": {"rows": 34_189, "counts": [26_008, 8_181]},
        "validation": {"rows": 4_884, "counts": [3_712, 1_172]},
        "test": {"rows": 9_769, "counts": [9_765, 4]},
    },
}
EVALUATION = {
    "model": evaluate_binary(LABELS, MODEL),
    "baselines": {
        "constant": evaluate_binary(LABELS, CONSTANT),
        "logistic_regression": evaluate_binary(LABELS, MODEL**2),
    },
    "reliability": reliability(LABELS, MODEL),
}


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as rows of cells."""
    parsed: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            parsed[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif parsed[-1]:
            parsed.append([])
    return [table for table in parsed if table]


def test_a_card_names_the_model_the_label_the_data_and_every_input():
    text = render(Project.model_validate(PROJECT), SUMMARY, EVALUATION)
    assert text.startswith("# income: mlp\n")
    assert "the probability that `income` is `>50K`" in text
    assert "- source: unused.parquet" in text
    assert f"- version: `{SUMMARY['data_version']}`" in text
    assert "- train: 34,189 rows, 23.9% positive" in text
    assert "- validation: 4,884 rows, 24.0% positive" in text
    assert "- test: 9,769 rows, 4 of 9,769 positive" in text
    for name, encoding in PROJECT["features"].items():
        assert f"- `{name}`: {PROJECT['data']['columns'][name]['type']}, {encoding['encode']}\n" in text


def test_a_card_names_the_sample_if_the_source_is_one():
    project = copy.deepcopy(PROJECT)
    project["data"]["source"] = {"sample": "adult"}
    assert "- source: sample adult" in render(Project.model_validate(project), SUMMARY, EVALUATION)


def test_a_card_has_the_metrics_of_the_model_and_every_baseline():
    quality, calibration = tables(render(Project.model_validate(PROJECT), SUMMARY, EVALUATION))
    head, rule, *rows = quality
    assert {len(row) for row in quality} == {len(head)}
    assert set(rule) == {"---"}
    assert [row[0] for row in rows] == ["**this model**", "constant", "logistic regression"]
    names = [name.replace(" ", "_") for name in head[1:]]
    for row, metrics in zip(rows, [EVALUATION["model"], *EVALUATION["baselines"].values()], strict=True):
        assert row[1:] == [f"{metrics[name]:.4f}" for name in names]
    assert {"auc", "accuracy", "brier", "calibration_error"} <= set(names)
    assert len(calibration) == 2 + len(EVALUATION["reliability"])
    assert calibration[2] == ["0.100", "0.000", "0.200"]


def test_the_card_for_a_label_of_classes_has_tables_of_classes_and_slices(tmp_path):
    project = Project.model_validate(texts.project(tmp_path))
    summary = {
        "data_version": "c0ffee" * 8,
        "parts": {name: {"rows": 240, "counts": [80, 60, 100]} for name in ("train", "validation", "test")},
    }
    rows = pd.DataFrame({"about": ["flights", "phones", None], LABEL: [0, 1, 2]})
    evaluation = predictions.evaluate(project, rows, np.eye(3) * 0.7 + 0.1)
    text = render(project, summary, {**evaluation, "baselines": {}})
    assert "Predicts the probabilities that `mood` is `bad`, `fine`, `good`." in text
    assert "- train: 240 rows, 33.3% bad, 25.0% fine, 41.7% good" in text
    for line in ("By class:", "By `about`:", "| phones | ", "| macro f1 |"):
        assert line in text
    assert "- `text`: text, tokens\n" in text
