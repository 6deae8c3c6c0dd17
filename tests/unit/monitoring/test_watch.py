"""Rounds of the watch, with a clock that the test sets."""

import pytest
from sqlalchemy.exc import OperationalError

from app.config import Serving
from app.errors import UserError
from app.monitoring import bandit, watch
from app.monitoring.watch import REBALANCE_S, Watch
from app.serving.backoff import FIRST_DELAY_S
from app.serving.control import workers
from app.serving.traffic import traffic
from app.state.audit import Audit
from tests.traffics import place
from tests.unit.serving.traffic.test_traffic import make_traffic

FOLLOWING = Serving.model_validate(
    {"follow": True, "variants": {"champion": {"version": "champion", "weight": 1}}}
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class FakeFollower:
    """Keeps the names of the models that it is called for, and fails for those in `errors`."""

    def __init__(self):
        self.faults = {}
        self.followed = []
        self.errors = {}

    def follow(self, audit, name, current):
        self.followed.append(name)
        if name in self.errors:
            raise self.errors[name]

    def forget(self, name):
        self.faults.pop(name, None)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def follower():
    return FakeFollower()


@pytest.fixture
def audit():
    with Audit() as audit:
        for model in ("a", "b", "c"):
            place(audit, model, make_traffic(), FOLLOWING)
        yield audit


@pytest.fixture
def monitor(clock, follower, audit):
    return Watch(lambda: ["a", "b", "c"], clock, follower)


def test_a_model_that_fails_is_retried_later_and_does_not_delay_others(monitor, follower, clock):
    follower.errors["b"] = RuntimeError("the registry is away")
    monitor.run_round()
    assert follower.followed == ["a", "b", "c"]
    clock.now += 1
    monitor.run_round()
    assert follower.followed == ["a", "b", "c", "a", "c"], "not due yet"
    report = monitor.report()
    assert (report.num_failures, list(report.faults)) == (1, ["b"])
    assert report.last_error == "following the registry failed: RuntimeError: the registry is away"
    del follower.errors["b"]
    clock.now += FIRST_DELAY_S
    monitor.run_round()
    assert follower.followed[-3:] == ["a", "b", "c"]
    assert monitor.report().faults == {}
    assert monitor.report().num_failures == 1, "past failures stay counted"


def test_the_report_says_when_the_last_round_ended(monitor, clock):
    clock.now += 5
    assert monitor.report().round_ended_s_ago == 5, "since the start"
    monitor.run_round()
    clock.now += 2
    assert monitor.report().round_ended_s_ago == 2


def test_an_unreadable_entry_is_a_fault_of_its_model_only(monitor, follower, audit):
    audit.add(traffic.TRAFFIC_ACTION, "b", {"of": "an older version"})
    monitor.run_round()
    assert follower.followed == ["a", "c"]
    assert "entry 4 of the audit log" in monitor.report().faults["b"]


def test_a_follower_that_fails_does_not_stop_the_bandit(monitor, follower, clock, monkeypatch):
    rebalanced, cleaned = [], []
    monkeypatch.setattr(workers, "stop_abandoned_workers", lambda audit, model: cleaned.append(model))
    monkeypatch.setattr(bandit, "rebalance", lambda audit, records, model, current: rebalanced.append(model))
    follower.errors = dict.fromkeys("abc", UserError("no"))
    clock.now += REBALANCE_S + 1
    monitor.run_round()
    assert rebalanced == cleaned == ["a", "b", "c"]
    monitor.run_round()
    assert rebalanced == ["a", "b", "c"], "only every REBALANCE_S"


def test_a_database_that_is_away_at_the_start_is_retried(monitor, follower, clock, monkeypatch):
    def refuse():
        raise OperationalError("connect", {}, Exception("connection refused"))

    with monkeypatch.context() as patch:
        patch.setattr(watch, "Audit", refuse)
        monitor.run_round()
    assert follower.followed == []
    assert "connection refused" in monitor.report().last_error
    clock.now += FIRST_DELAY_S
    monitor.run_round()
    assert follower.followed == ["a", "b", "c"]


def test_the_fault_of_a_model_is_removed_with_its_endpoint(clock, follower, audit):
    models = ["a", "b"]
    monitor = Watch(lambda: models, clock, follower)
    follower.errors["b"] = RuntimeError("gone")
    monitor.run_round()
    models.remove("b")
    monitor.run_round()
    assert monitor.report().faults == {}


def test_the_thread_runs_rounds_until_it_is_stopped(follower, audit, monkeypatch):
    monkeypatch.setattr(watch, "ROUND_S", 0.01)
    monitor = Watch(lambda: ["a"], follower=follower)
    assert not monitor.is_alive()
    monitor.start()
    while not follower.followed:
        assert monitor.is_alive()
    monitor.stop()
    monitor._thread.join()
    assert not monitor.is_alive()
