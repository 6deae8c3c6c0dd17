import copy
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from app.bundle.bundle import Bundle
from app.bundle.manifest import BrokenBundle, seal
from app.tasks.recommender.graph import LOWEST, difference
from tests.families import Built
from tests.unit.tasks.recommender.example import NUM_ITEMS, NUM_USERS


@pytest.fixture(params=["mf", "ncf"])
def built(build, request) -> Built:
    return build("recommender", request.param)


def test_the_graph_ranks_the_items_that_a_user_has_not_seen(built):
    catalogue = built.task.catalogue
    users = [f"u{i}" for i in range(NUM_USERS)]
    ranking = built.bundle.rank({"who": np.array(users, dtype=object)})
    assert ranking.items.shape == (NUM_USERS, NUM_ITEMS)
    assert ranking.known.all()
    seen = built.task.seen_in("train", "validation").numpy()
    indices = catalogue.user_indices(users)
    with torch.no_grad():
        scores = built.network(torch.from_numpy(indices)).numpy()
    for row, user in enumerate(indices):
        expected = [i for i in np.argsort(-scores[row], kind="stable") if not seen[user, i]]
        items = [item for item in ranking.items[row] if item]
        assert items == [catalogue.items[i] for i in expected]
        assert (ranking.scores[row, len(expected) :] == LOWEST).all()


def test_an_unknown_user_gets_the_most_popular_items(built):
    catalogue = built.task.catalogue
    ranking = built.bundle.rank({"who": np.array(["nobody", None, "u1"], dtype=object)})
    assert ranking.known.tolist() == [False, False, True]
    for row in (0, 1):
        assert ranking.items[row].tolist() == catalogue.items
        assert ranking.scores[row].tolist() == catalogue.popularity


def test_the_input_has_the_name_of_the_user_column(built):
    session = onnxruntime.InferenceSession(built.bundle.path / "model.onnx")
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("who", "tensor(string)", ["rows"])]
    assert {o.name: o.type for o in session.get_outputs()} == {
        "items": "tensor(string)",
        "scores": "tensor(float)",
        "known": "tensor(bool)",
    }


def test_the_graph_of_another_network_is_refused(built):
    other = copy.deepcopy(built.network)
    with torch.no_grad():
        other.item_bias.weight[3] += 0.5
    users, seen = np.array(["u1", "u2"], dtype=object), built.task.seen_in("train", "validation")
    with pytest.raises(RuntimeError, match="differs from the trained model"):
        difference(other, built.task.catalogue, seen, built.bundle.path / "model.onnx", users)


def test_a_bundle_with_other_scores_for_its_example_is_refused(built, tmp_path):
    path = shutil.copytree(built.bundle.path, tmp_path / "bundle")
    example = json.loads((path / "example.json").read_text())
    scores = (np.array(example["scores"]) + 1).tolist()
    (path / "example.json").write_text(json.dumps({**example, "scores": scores}))
    seal(path, {})
    with pytest.raises(BrokenBundle, match=r"its example\.json"):
        Bundle(path).check_example()
