"""The bundle of a trained network, and the baselines, built once."""

import json

import pytest

from app.bundle.bundle import Bundle
from app.jobs import candidate
from app.tasks import task_of
from app.training import trainer
from app.training.trainer import Trained
from tests import tabular


@pytest.fixture
def task(home):
    project = tabular.project()
    parts = {**tabular.PARTS, "test": 60}
    return task_of(project, tabular.prepared(home / "stages" / "prepare" / "key", parts))


@pytest.fixture
def trained(task, tmp_path, monkeypatch) -> Trained:
    from safetensors.torch import save_file

    monkeypatch.setattr(trainer, "key", lambda project, prepared: "trained")
    (tmp_path / "trained").mkdir()
    save_file(task.network().state_dict(), tmp_path / "trained" / "model.safetensors")
    return Trained(tmp_path / "trained", "key", False)


def test_a_candidate_is_a_sealed_bundle_with_its_metrics(task, trained):
    folder = candidate.build(task.project, task, trained, {"constant": {"auc": 0.5}})
    bundle = Bundle(folder)
    bundle.check_example()
    assert "decision" not in bundle.manifest
    assert bundle.manifest["prepared"] == task.prepared.key
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["baselines"] == {"constant": {"auc": 0.5}}
    assert metrics["onnx_difference"] < 1e-4
    assert candidate.build(task.project, task, trained, {}) == folder, "the bundle is built once"


def test_baselines_are_computed_once(task, monkeypatch):
    num_calls = 0

    def baselines_of(_):
        nonlocal num_calls
        num_calls += 1
        return {"constant": {"auc": 0.5}}

    monkeypatch.setattr(candidate, "baselines_of", baselines_of)
    for _ in range(2):
        assert candidate.baselines(task) == {"constant": {"auc": 0.5}}
    assert num_calls == 1


def test_the_key_depends_on_the_sections_of_the_bundle(task, trained):
    key = candidate.key(task.project, task.prepared)
    gate = task.project.gate.model_copy(update={"tolerance": 0.1})
    assert candidate.key(task.project.model_copy(update={"gate": gate}), task.prepared) != key
    serving = task.project.serving.model_copy(update={"port": 1234})
    assert candidate.key(task.project.model_copy(update={"serving": serving}), task.prepared) == key
