import pytest

from app.cluster.capacity import Capacity
from app.errors import UserError


def capacity(total=2.0, free=2.0, grows=False, **endpoints):
    return Capacity(total, free, endpoints, grows)


def test_who_finds_room_does_not_wait():
    assert capacity().wait(2, "x") is None
    assert capacity(free=1.5, income=0.5).wait(1.5, "x") is None


def test_who_waits_says_for_what_and_who_holds_it():
    message = capacity(free=0.5, income=0.5).wait(1, "x")
    assert "waiting for 1 CPUs: 0.5 of 2 are free" in message
    assert "(held by: endpoint income 0.5, other commands 1)" in message
    assert "Ctrl-C" in message


def test_nobody_waits_for_ever():
    with pytest.raises(UserError, match="x asks for 3 CPUs, but the cluster has 2; lower it"):
        capacity().wait(3, "x")
    with pytest.raises(UserError, match=r"endpoints leave 1.5 of the cluster's 2 \(endpoint income 0.5\)"):
        capacity(free=1.5, income=0.5).wait(2, "x")
    assert "waiting for 3 CPUs" in capacity(grows=True).wait(3, "x")


def test_an_endpoint_that_is_deployed_again_has_its_own_cpus():
    assert capacity(free=0.5, income=1.5).wait(2, "x", besides="income") is None


def test_workers_share_what_endpoints_leave():
    assert capacity().share(1, 2, "x") == (1, None)
    share, note = capacity(free=1.5, income=0.5).share(1, 2, "x")
    assert share == 0.75
    assert "endpoints leave 1.5 of 2 CPUs (endpoint income 0.5): each of 2 workers claims 0.75" in note
    assert "waiting" not in note
    share, note = capacity(free=0.0, income=0.5).share(1, 2, "x")
    assert share == 0.75
    assert "waiting for 1.5 CPUs" in note


def test_what_another_command_holds_is_waited_for():
    share, note = capacity(free=0.0).share(1, 2, "x")
    assert share == 1
    assert "waiting for 2 CPUs" in note


def test_where_there_is_no_share_it_is_said():
    with pytest.raises(UserError, match="endpoints leave 0 of the cluster's 2"):
        capacity(free=0.0, income=2.0).share(1, 2, "x")
    with pytest.raises(UserError, match="but the cluster has 2"):
        capacity().share(1, 4, "x")
