import json

import numpy as np
import pytest
import torch

from app.tasks.text.task import Task
from tests.families import Built, tensors


@pytest.fixture
def built(build) -> Built:
    return build("text", "text_classifier")


def test_a_batch_is_padded_to_its_longest_text(built):
    arrays = tensors(built.task, "train")
    assert set(arrays) == {"ids", "lengths", "y", "weight"}
    ids, mask, y, weight = built.task.batch(arrays, torch.tensor([3, 5]))
    assert ids.shape == mask.shape == (2, int(arrays["lengths"][[3, 5]].max()))
    assert mask.sum(dim=1).tolist() == arrays["lengths"][[3, 5]].tolist()
    assert (y.dtype, weight.tolist()) == (torch.int64, [1, 1])


def test_balanced_classes_have_equal_total_weights(built):
    training = built.task.project.training.model_copy(update={"class_weights": "balanced"})
    task = Task(built.task.project.model_copy(update={"training": training}), built.task.prepared)
    arrays = tensors(task, "train")
    sums = [float(arrays["weight"][arrays["y"] == label].sum()) for label in range(3)]
    assert sums == pytest.approx([len(arrays["y"]) / 3] * 3, rel=0.01)


def test_outputs_are_in_the_order_of_the_rows(built):
    arrays = tensors(built.task, "validation")
    with torch.no_grad():
        probabilities, labels = built.task.outputs(built.network, arrays)
        alone = [built.network(*built.task.batch(arrays, torch.tensor([row]))[:2]) for row in range(8)]
    torch.testing.assert_close(probabilities[:8], torch.cat(alone))
    assert torch.equal(labels, arrays["y"])


def test_a_frozen_encoder_runs_once_for_each_row(built, build):
    frozen = build("text", "frozen text_classifier").task
    arrays, network = tensors(frozen, "train"), frozen.network()
    num_rows = len(arrays["y"])
    assert arrays["vectors"].shape == (num_rows, 16)
    assert torch.equal(frozen.arrange(arrays, torch.arange(num_rows), 16), torch.arange(num_rows))
    trainable = built.task.network()
    trainable.head.load_state_dict(network.head.state_dict())
    with torch.no_grad():
        expected = built.task.outputs(trainable.eval(), tensors(built.task, "train"))[0]
        torch.testing.assert_close(frozen.outputs(network.eval(), arrays)[0], expected)


def test_the_word_baseline_beats_the_constant(built):
    scores = json.loads((built.bundle.path / "metrics.json").read_text())["baselines"]
    assert scores["constant"]["macro_f1"] < 0.3
    assert scores["tfidf_logistic_regression"]["macro_f1"] > 0.9


def test_labels_are_indices_of_classes(built):
    labels = built.task.prepared.frame("test")["__label__"]
    assert labels.dtype == np.int64
    assert set(labels) == {0, 1, 2}
