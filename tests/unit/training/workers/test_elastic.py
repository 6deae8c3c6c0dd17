from types import SimpleNamespace

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from app.training.workers import elastic
from app.training.workers.elastic import FreeResources


@pytest.fixture
def policy(monkeypatch):
    """Create the policy for 2 to 8 workers; `free` is the number of free CPUs of each node."""

    def create(free, draining=()):
        state = SimpleNamespace(
            available_resources_per_node=lambda: {node: {"CPU": n} for node, n in free.items()},
            get_draining_nodes=lambda: dict.fromkeys(draining, 0),
        )
        monkeypatch.setattr(ray._private.state, "state", state)
        monkeypatch.setattr(elastic, "RELEASE_S", 0.0)
        monkeypatch.setattr(FreeResources, "_maybe_send_resource_request", lambda self: None)
        return FreeResources(ScalingConfig(num_workers=(2, 8), elastic_resize_monitor_interval_s=0))

    return create


def running_on(*nodes):
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
    return SimpleNamespace(start_time=0.0, workers=workers, num_workers=len(workers))


@pytest.mark.parametrize(
    ("free", "draining", "expected"),
    [
        ({"a": 3.0, "b": 2.5}, (), 5),
        ({"a": 3.0, "b": 2.5}, ("a",), 2),
        ({"a": 30.0}, (), 8),
    ],
)
def test_a_group_starts_with_as_many_workers_as_fit_on_nodes_that_stay(policy, free, draining, expected):
    decision = policy(free, draining).make_decision_for_non_running_worker_group()
    assert decision.num_workers == expected


def test_a_group_waits_until_there_is_room_for_the_minimum(policy):
    waiting = policy({"a": 1.0, "b": 0.5})
    assert isinstance(waiting.make_decision_for_non_running_worker_group(), NoopDecision)


@pytest.mark.parametrize(
    ("free", "draining", "expected"),
    [
        ({"a": 0.0, "b": 0.0}, (), None),
        ({"a": 1.0, "b": 0.0, "c": 2.0}, (), 6),
        ({"a": 0.0, "b": 0.0}, ("b",), 2),
    ],
)
def test_a_running_group_counts_its_own_resources_and_free_ones(policy, free, draining, expected):
    group = running_on("a", "a", "b")
    decision = policy(free, draining).make_decision_for_running_worker_group(group, None)
    assert getattr(decision, "num_workers", None) == expected
