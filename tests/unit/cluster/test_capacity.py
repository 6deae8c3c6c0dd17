import pytest

from app.cluster.capacity import Capacity
from app.errors import UserError


def capacity(total=2.0, free=2.0, autoscales=False, **endpoints):
    return Capacity(total, free, endpoints, autoscales)


def test_no_message_if_enough_cpus_are_free():
    assert capacity().wait_message(2, "x") is None
    assert capacity(free=1.5, income=0.5).wait_message(1.5, "x") is None


def test_the_message_names_the_cpus_and_what_holds_them():
    message = capacity(free=0.5, income=0.5).wait_message(1, "x")
    assert "waiting for 1 CPUs: 0.5 of 2 are free" in message
    assert "(in use: endpoint income 0.5, other commands 1)" in message
    assert "Ctrl-C" in message


def test_cpus_that_can_never_become_free_are_refused():
    with pytest.raises(UserError, match="x needs 3 CPUs, but the cluster has 2; lower it"):
        capacity().wait_message(3, "x")
    with pytest.raises(UserError, match=r"endpoints leave 1.5 of the cluster's 2 \(endpoint income 0.5\)"):
        capacity(free=1.5, income=0.5).wait_message(2, "x")
    assert "waiting for 3 CPUs" in capacity(autoscales=True).wait_message(3, "x")


def test_cpus_of_the_endpoint_that_is_deployed_again_count_as_free():
    assert capacity(free=0.5, income=1.5).wait_message(2, "x", excluding="income") is None


def test_workers_share_the_cpus_that_endpoints_leave():
    assert capacity().cpus_per_worker(1, 2, "x") == (1, None)
    claim, note = capacity(free=1.5, income=0.5).cpus_per_worker(1, 2, "x")
    assert claim == 0.75
    assert "endpoints leave 1.5 of 2 CPUs (endpoint income 0.5): each of 2 workers claims 0.75" in note
    assert "waiting" not in note
    claim, note = capacity(free=0.0, income=0.5).cpus_per_worker(1, 2, "x")
    assert claim == 0.75
    assert "waiting for 1.5 CPUs" in note


def test_workers_wait_for_cpus_of_other_commands():
    claim, note = capacity(free=0.0).cpus_per_worker(1, 2, "x")
    assert claim == 1
    assert "waiting for 2 CPUs" in note


def test_workers_that_never_fit_are_refused():
    with pytest.raises(UserError, match="endpoints leave 0 of the cluster's 2"):
        capacity(free=0.0, income=2.0).cpus_per_worker(1, 2, "x")
    with pytest.raises(UserError, match="but the cluster has 2"):
        capacity().cpus_per_worker(1, 4, "x")
