"""Horovod on Ray Train: real ranks, killed for real."""

import json
import os

import pytest

from app import projectfile

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL = ("data.source.limit=3000", "training.batch_size=16", "training.epochs=4")


@pytest.fixture(scope="module")
def project():
    return projectfile.load("configs/smoke.yaml", SMALL)


@pytest.fixture(scope="module")
def prepared(ray_cluster, project):
    from app.data.prepare import prepare

    return prepare(project)


@pytest.fixture
def observed(monkeypatch, tmp_path):
    """Replaces the loop by one that notes each rank's process and parameters when it ends.

    `observed(before)` also has each rank call `before(loop)` when it starts.
    """
    from app.training import trainer

    original = trainer.loop.train

    def observe(before=None):
        def train_loop(settings):
            import hashlib

            import ray.train

            from app.training import loop

            rank = ray.train.get_context().get_world_rank()
            if before:
                before(loop, rank)
            model = original(settings)
            digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
            note = {"pid": os.getpid(), "parameters": digest.hexdigest()}
            (tmp_path / f"rank-{rank}.json").write_text(json.dumps(note))

        monkeypatch.setattr(trainer.loop, "train_loop", train_loop)
        return lambda: [json.loads(f.read_text()) for f in sorted(tmp_path.glob("rank-*.json"))]

    return observe


@pytest.fixture(scope="module")
def uninterrupted(prepared, project):
    from app.training import trainer

    return trainer.train(project, prepared, lambda _: None, fresh=True).history


def test_two_processes_end_with_equal_parameters(prepared, project, observed):
    from app.training import trainer

    ranks = observed()
    heard = []
    trained = trainer.train(project, prepared, heard.append, fresh=True)
    first, second = ranks()
    assert first["pid"] != second["pid"]
    assert first["parameters"] == second["parameters"]
    assert [epoch["epoch"] for epoch in heard] == [0, 1, 2, 3]
    assert trained.history == heard
    assert trained.history[-1]["train_loss"] < trained.history[0]["train_loss"]


def test_the_same_seed_gives_the_same_history(prepared, project, uninterrupted):
    from app.training import trainer

    again = trainer.train(project, prepared, lambda _: None, fresh=True).history
    timeless = [{k: v for k, v in epoch.items() if k != "rows_per_s"} for epoch in again]
    assert timeless == [{k: v for k, v in epoch.items() if k != "rows_per_s"} for epoch in uninterrupted]


def test_two_workers_learn_what_one_learns(prepared, project, uninterrupted):
    """Two ranks with batches of 16 take the steps of one rank with 32, on other batches."""
    from app.training import trainer

    training = project.training.model_copy(update={"num_workers": 1, "batch_size": 32})
    alone = project.model_copy(update={"training": training})
    history = trainer.train(alone, prepared, lambda _: None, fresh=True).history
    assert history[-1]["validation_auc"] == pytest.approx(uninterrupted[-1]["validation_auc"], abs=0.02)


def test_a_rank_killed_mid_epoch_resumes_to_the_same_end(
    prepared, project, observed, uninterrupted, tmp_path
):
    from app.training import trainer

    marker = tmp_path / "killed"

    def die_once(loop, rank):
        """Rank 1 kills itself in the middle of the third epoch, the first time."""
        import os
        import signal

        average, calls = loop.FlatGradients.average, [0]

        def counted(gradients):
            calls[0] += 1
            if rank == 1 and calls[0] == 2 * 66 + 30 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            average(gradients)

        loop.FlatGradients.average = counted

    ranks = observed(die_once)
    heard = []
    trained = trainer.train(project, prepared, heard.append, fresh=True)
    assert marker.exists()
    assert len(ranks()) == 2
    assert [epoch["epoch"] for epoch in trained.history] == [0, 1, 2, 3]
    # The first two epochs were not trained again.
    assert [epoch["epoch"] for epoch in heard] == [0, 1, 2, 3]
    assert trained.history[-1]["train_loss"] == pytest.approx(uninterrupted[-1]["train_loss"], abs=1e-6)
    assert trained.history[-1]["validation_auc"] == pytest.approx(
        uninterrupted[-1]["validation_auc"], abs=1e-6
    )


def test_too_many_workers_for_the_cluster_is_said_at_once(ray_cluster):
    from app import cluster
    from app.errors import UserError

    with pytest.raises(UserError, match=r"training.num_workers asks for 999 CPUs, but the cluster has \d+"):
        cluster.shortage(999, "training.num_workers")
