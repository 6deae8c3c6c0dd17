"""From rows to the gate's decision with the code of all stages, in one process and without training."""

import io
import json
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from app.bundle.manifest import manifest_of
from app.config import Project
from app.console import Console
from app.jobs import candidate, judging, pipeline
from app.registry import runs, versions
from app.registry.versions import CHALLENGER, CHAMPION
from app.tasks import task_of
from app.training.trainer import Trained
from tests import without_ray


def table() -> pa.Table:
    random = np.random.default_rng(0)
    age = random.uniform(18, 90, 3000)
    earns = np.where(age + random.normal(0, 20, 3000) > 60, ">50K", "<=50K")
    return pa.table(
        {"age": age, "zip": random.choice(["01234", "98765"], 3000), "new": random.random(3000), "pay": earns}
    )


def project(**changes) -> Project:
    document = {
        "name": "judged",
        "data": {
            "source": {"path": "rows.parquet"},
            "label": {"column": "pay", "positive": ">50K"},
            "columns": {"age": {"type": "number"}, "zip": {"type": "category"}},
        },
        "features": {"age": {"encode": "min_max"}, "zip": {"encode": "one_hot"}},
        "model": {"kind": "linear"},
        "training": {"num_workers": 1, "epochs": 1, "batch_size": 8, "learning_rate": 0.1},
        "gate": {"beat": [], "tolerance": 1},
        "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = document
        for part in path:
            section = section[part]
        section[last] = value
    return Project.model_validate(document)


@pytest.fixture
def name(request) -> str:
    """A model name that only this test uses."""
    return f"judged-{zlib.crc32(request.node.name.encode())}"


@pytest.fixture
def judged(name, home_with_mlflow, tmp_path, monkeypatch):
    """Judges and registers an untrained network of a project; returns its metrics, the decision and the
    bundle."""
    monkeypatch.setenv("RAYLWAY_HOME", str(home_with_mlflow))
    num_judged = 0

    def judge(project: Project):
        nonlocal num_judged
        num_judged += 1
        named = pipeline.with_champion_key(project.model_copy(update={"name": name}))
        task = task_of(named, without_ray.prepare(named, table()))
        torch.manual_seed(num_judged)
        folder = tmp_path / f"trained-{num_judged}"
        folder.mkdir()
        save_file(task.network().state_dict(), folder / "model.safetensors")
        path = candidate.build(named, task, Trained(folder, str(num_judged), False), {}, fresh=True)
        metrics = json.loads((path / "metrics.json").read_text())["model"]
        with runs.run(named, str(num_judged)) as run:
            path, decision, _ = judging.register(
                named.name, path, named.gate, task, run, Console(io.StringIO())
            )
        return metrics, decision, path

    return judge


MORE = {
    "data__columns": {"age": {"type": "number"}, "zip": {"type": "category"}, "new": {"type": "number"}},
    "features": {"age": {"encode": "min_max"}, "new": {"encode": "min_max"}},
}


def test_candidate_and_champion_are_compared_on_unseen_rows(judged, name):
    """With another seed and one more column, the champion has its own score on its own test rows."""
    first, decision, _ = judged(project())
    assert decision.reason == f"auc {first['auc']:.4f} (no champion yet)"
    second, decision, path = judged(project(seed=7, **MORE))
    assert decision.reason == f"auc {second['auc']:.4f} (champion {first['auc']:.4f})"
    assert (path / "card.md").read_text().endswith(f"## Gate\n\nPassed: {decision.reason}.\n")
    assert versions.find(name, CHALLENGER) is not None


def test_the_reason_has_the_number_of_rows_if_the_splits_differ(judged):
    judged(project())
    _, decision, path = judged(project(data__split={"test": 0.6, "key": ["age"], "seed": 3}))
    assert "test rows that neither was trained on" in decision.reason
    sealed = manifest_of(path)["decision"]["champion"]["comparison"]
    assert 200 <= sealed["num_rows"] < sealed["num_test_rows"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data__label": {"column": "pay", "positive": "<=50K"}},
            "data.label.positive was '>50K' and is '<=50K'",
        ),
        (
            {**MORE, "data__columns": {"age": {"type": "number"}, "new": {"type": "number"}}},
            "'zip' is no longer in",
        ),
        ({"data__split": {"seed": 3}}, "and a comparison needs 200"),
    ],
)
def test_a_candidate_that_cannot_be_compared_becomes_the_challenger(judged, name, changes, reason):
    judged(project())
    _, decision, path = judged(project(**changes))
    assert decision.passed
    assert "; not compared with the champion: " in decision.reason
    assert reason in decision.reason
    assert reason in (path / "card.md").read_text()
    assert versions.find(name, CHALLENGER).path == path
    assert versions.find(name, CHAMPION).path != path
