"""Training on several Ray nodes on this machine: nodes join, are preempted, and die."""

import socket
import time

import pytest

from tests.nodes import nodes

pytestmark = pytest.mark.integration

SMALL = ("data.source.limit=3000", "training.batch_size=16", "training.epochs=4", "training.max_failures=0")


@pytest.fixture
def cluster(home):
    """A cluster of its own, besides the shared one. Its head has no CPUs."""
    with nodes() as cluster:
        yield cluster


def listens(address: str, port: str) -> bool:
    with socket.socket() as client:
        return client.connect_ex((address, int(port))) == 0


@pytest.mark.slow
def test_four_ranks_train_on_two_nodes(cluster, tmp_path):
    node_ids = {cluster.join(num_cpus=2).id, cluster.join(num_cpus=2).id}
    training = cluster.train(tmp_path / "run", *SMALL, "training.num_workers=4", seconds_per_step=0.05)
    rendezvous = training.wait_for_ranks(4, timeout=180)[0]["environment"]
    port = rendezvous["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    assert listens(cluster.host.address, port)
    assert not listens("127.0.0.1", port)
    assert training.wait_for("end", timeout=90)["history"][-1]["epoch"] == 3
    ranks = sorted(training.ranks(), key=lambda rank: rank["rank"])
    assert [rank["node"] for rank in ranks[::2]] == [rank["node"] for rank in ranks[1::2]]
    assert {rank["node"] for rank in ranks} == node_ids
    local_and_cross_ranks = [
        [rank["environment"][f"HOROVOD_{k}_RANK"] for k in ("LOCAL", "CROSS")] for rank in ranks
    ]
    assert local_and_cross_ranks == [["0", "0"], ["1", "0"], ["0", "1"], ["1", "1"]]
    assert len({rank["parameters"] for rank in ranks}) == 1
    for rank in ranks:
        rank["listens"].remove("::")  # Ray's own port
        assert set(rank["listens"]) <= {cluster.host.address}


@pytest.mark.slow
def test_ranks_move_from_a_preempted_node_to_another(cluster, tmp_path):
    for _ in range(2):
        cluster.join(num_cpus=2)
    plain = cluster.train(tmp_path / "plain", *SMALL).wait_for("end", timeout=120)["history"]
    training = cluster.train(tmp_path / "moved", *SMALL, seconds_per_step=0.05)
    (preempted,) = {rank["node"] for rank in training.wait_for_ranks(2, timeout=120)}
    training.wait_for("epoch", timeout=60)
    time.sleep(1)  # in the middle of the second epoch
    cluster.drain(preempted, seconds=60)
    training.wait_for("note", "a node is going away", timeout=15)
    training.wait_for("note", "resuming from epoch 2, step ", timeout=60)
    moved = training.wait_for("end", timeout=60)["history"]
    assert preempted not in {rank["node"] for rank in training.ranks()[2:]}
    for name in ("train_loss", "validation_loss"):
        assert [e[name] for e in moved] == pytest.approx([e[name] for e in plain], abs=1e-6)


@pytest.mark.slow
def test_an_elastic_group_grows_and_shrinks_with_the_cluster(cluster, tmp_path):
    first_node = cluster.join(num_cpus=1)
    elastic = ("training.num_workers=[1, 3]", "training.epochs=20", "training.max_failures=1")
    training = cluster.train(tmp_path / "run", *SMALL, *elastic, seconds_per_step=0.05)
    (first,) = training.wait_for_ranks(1, timeout=180)
    assert first["node"] == first_node.id
    training.wait_for("epoch", timeout=60)
    second_node = cluster.join(num_cpus=2)
    nodes = [rank["node"] for rank in training.wait_for_ranks(3, timeout=45)]
    assert sorted(nodes) == sorted([first_node.id, second_node.id, second_node.id])
    training.wait_for("note", "3 workers", timeout=30)  # from a checkpoint
    training.wait_for("epoch", timeout=60)
    second_node.kill()
    training.wait_for("note", "1 workers", timeout=90)
    end = training.wait_for("end", timeout=200)
    assert [epoch["epoch"] for epoch in end["history"]] == list(range(20))
    assert end["without_effect"] == [], "Ray calls the overrides of an elastic group"
