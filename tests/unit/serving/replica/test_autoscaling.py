import time
from types import SimpleNamespace

import pytest

from app.serving.replica.autoscaling import LOAD, MAX_INTERVAL_S, LoadPolicy, ThreadLoad


def context(loads=None, target_num_replicas=2):
    return SimpleNamespace(
        aggregated_metrics=loads and {LOAD: loads}, target_num_replicas=target_num_replicas
    )


@pytest.mark.parametrize(
    ("loads", "num_replicas"), [({"a": 0.9, "b": 0.9}, 3.0), ({"a": 0.3, "b": 0.0}, 0.5), ({"a": 0.6}, 1.0)]
)
def test_the_number_of_replicas_is_the_sum_of_loads_over_the_target(loads, num_replicas):
    assert LoadPolicy(0.6)(context(loads)) == (pytest.approx(num_replicas), {})


def test_the_number_of_replicas_stays_without_loads():
    assert LoadPolicy(0.6)(context()) == (2, {})
    assert LoadPolicy(0.6)(context({})) == (2, {})


def test_the_load_of_a_thread_is_the_share_of_time_that_it_is_busy():
    load = ThreadLoad()
    time.sleep(0.2)
    assert load.share() < 0.5
    until = time.thread_time() + 0.1
    while time.thread_time() < until:
        pass
    assert load.share() > 0.5


def test_an_autoscaler_that_does_not_read_the_load_is_a_fault():
    now = [0.0]
    load = ThreadLoad(lambda: now[0])
    now[0] += MAX_INTERVAL_S
    assert "has not read the replica's load" in load.faults()[0]
    load.share()
    assert load.faults() == []
