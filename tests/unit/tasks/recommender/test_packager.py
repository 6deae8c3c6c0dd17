import pyarrow as pa
import pyarrow.compute
import pytest
import torch
from safetensors.torch import save_file

from app.bundle.bundle import Bundle
from app.tasks.recommender.packager import Packager
from app.tasks.recommender.task import Task
from tests import without_ray
from tests.families import Built, tensors, train
from tests.unit.tasks.recommender import example


@pytest.fixture(params=["mf", "ncf"])
def built(build, request) -> Built:
    return build("recommender", request.param)


def test_a_bundle_is_evaluated_like_its_network(built):
    """The held-out test item is ranked among the items outside the training and the validation part."""
    metrics = built.packager.evaluate(built.bundle)["model"]
    task = Task(built.task.project, built.task.prepared)
    task.seen = task.seen_in("train", "validation")
    with torch.no_grad():
        expected = task.metrics(*task.outputs(built.network, tensors(task, "test")))
    assert metrics == pytest.approx({name: expected[name] for name in metrics})


def test_a_champion_of_other_data_ranks_by_its_own_catalogue(built, tmp_path):
    """One user and one item of the test part are unknown to the champion."""
    rows = example.table()
    for column, missing in (("who", "u3"), ("what", "i5")):
        rows = rows.filter(pa.compute.not_equal(rows[column], missing))
    champion = Task(built.task.project, without_ray.prepare(built.task.project, rows))
    network, folder = train(champion), tmp_path / "champion"
    folder.mkdir()
    Packager(champion).export(network, folder)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "schema.json").write_text(Packager(champion).schema().model_dump_json())
    (folder / "project.json").write_text(champion.project.model_dump_json())
    metrics = built.packager.evaluate(Bundle(folder, sealed=False))["model"]
    assert 0.5 < metrics["hr@10"] <= 1
