from typing import Any

import numpy as np
import pytest
import torch

from app.config import Project
from app.data.interactions import AGE
from app.data.prepare import Prepared
from app.evaluation import ranking
from app.tasks.recommender.task import Task
from tests.families import tensors, train, validate
from tests.unit.tasks.recommender import example


@pytest.fixture
def prepared(build) -> Prepared:
    return build("recommender", "mf").task.prepared


def task_with(prepared: Prepared, **changes: Any) -> Task:
    """A task whose model has other settings than the example."""
    model = {**example.MODELS["mf"], **changes}
    return Task(Project.model_validate({**example.PROJECT, "model": model}), prepared)


def test_negatives_are_never_items_of_the_user(prepared):
    task = task_with(prepared)
    arrays = tensors(task, "train")
    users, _, _, negatives, allowed = task.batch(arrays, torch.arange(100))
    assert len(set(negatives.tolist())) == 16
    had = {(u, i) for u, i in zip(arrays["user"].tolist(), arrays["item"].tolist(), strict=True)}
    for row, user in enumerate(users.tolist()):
        for item, is_allowed in zip(negatives.tolist(), allowed[row].tolist(), strict=True):
            assert is_allowed == ((user, item) not in had)


def test_recent_interactions_count_more(prepared):
    frame = prepared.frame("train")
    weights = task_with(prepared, recency=0.3).arrays(frame)["weight"]
    np.testing.assert_allclose(weights, np.exp(-frame[AGE] / 0.3), rtol=1e-6)
    assert (task_with(prepared).arrays(frame)["weight"] == 1).all()


@pytest.mark.parametrize("changes", [{"loss": "softmax"}, {"loss": "bpr"}, {"negatives": 1000}], ids=str)
def test_every_loss_learns_the_two_kinds_of_users(prepared, changes):
    task = task_with(prepared, **changes)
    metrics = validate(task, train(task))
    # A user has 10 or 11 items of the own kind left, of 30 or 31 in all: chance gives 10 / 30.
    assert metrics["hr@10"] > 0.75
    assert set(metrics) == {"loss", "hr@10", "ndcg@10", "mrr"}


def test_explicit_feedback_learns_ratings(build):
    built = build("recommender", "mf of ratings")
    assert built.task.score == "r2"
    _, metrics = built.validation
    assert metrics["r2"] > 0.5, "every user rates an item equally"
    assert metrics["loss"] == pytest.approx(metrics["rmse"] ** 2)
    evaluation = built.packager.evaluate(built.bundle)
    assert set(evaluation["model"]) == {"hr@10", "ndcg@10", "mrr", "rmse", "r2"}


def test_validation_ranks_the_items_that_the_user_has_not_seen_in_training(prepared):
    task = task_with(prepared)
    network, arrays = task.network().eval(), tensors(task, "validation")
    with torch.no_grad():
        ranks = task.outputs(network, arrays)[0]
        scores = network(arrays["user"]).numpy()
    seen = task.seen[arrays["user"]].numpy()
    assert seen.sum() == example.NUM_USERS * 10
    np.testing.assert_allclose(ranks, ranking.ranks(scores, seen, arrays["item"].numpy()))
