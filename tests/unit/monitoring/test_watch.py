"""The watch, round by round, with a clock of the test's."""

import pytest
from sqlalchemy.exc import OperationalError

from app.config import Serving
from app.errors import UserError
from app.monitoring import bandit, watch
from app.monitoring.watch import REBALANCE_S, Watch
from app.serving.backoff import FIRST_DELAY_S
from app.serving.control import applications
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


class Follows:
    """In the follower's place: notes whom it looked at, and fails for those in `broken`."""

    def __init__(self):
        self.faults = {}
        self.looked = []
        self.broken = {}

    def follow(self, audit, name, current):
        self.looked.append(name)
        if name in self.broken:
            raise self.broken[name]

    def forget(self, name):
        self.faults.pop(name, None)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def follows():
    return Follows()


@pytest.fixture
def audit():
    with Audit() as audit:
        for model in ("a", "b", "c"):
            place(audit, model, make_traffic(), FOLLOWING)
        yield audit


@pytest.fixture
def watching(clock, follows, audit):
    return Watch(lambda: ["a", "b", "c"], clock, follows)


def test_one_model_that_fails_holds_up_no_other_and_is_tried_again_later(watching, follows, clock):
    follows.broken["b"] = RuntimeError("the registry is away")
    watching.round()
    assert follows.looked == ["a", "b", "c"]
    clock.now += 1
    watching.round()
    assert follows.looked == ["a", "b", "c", "a", "c"], "not due yet"
    watched = watching.report()
    assert (watched.failures, list(watched.faults)) == (1, ["b"])
    assert watched.last_error == "following the registry failed: RuntimeError: the registry is away"
    del follows.broken["b"]
    clock.now += FIRST_DELAY_S
    watching.round()
    assert follows.looked[-3:] == ["a", "b", "c"]
    assert watching.report().faults == {}
    assert watching.report().failures == 1, "it has failed, though it does not any more"


def test_an_entry_that_cannot_be_read_is_the_fault_of_its_model_alone(watching, follows, audit):
    audit.add(traffic.TRAFFIC_ACTION, "b", {"of": "an older version"})
    watching.round()
    assert follows.looked == ["a", "c"]
    assert "entry 4 of the audit log" in watching.report().faults["b"]


def test_a_follower_that_fails_does_not_stop_the_bandit(watching, follows, clock, monkeypatch):
    rebalanced, tidied = [], []
    monkeypatch.setattr(applications, "tidy", lambda audit, model: tidied.append(model))
    monkeypatch.setattr(bandit, "rebalance", lambda audit, records, model, held: rebalanced.append(model))
    follows.broken = dict.fromkeys("abc", UserError("no"))
    clock.now += REBALANCE_S + 1
    watching.round()
    assert rebalanced == tidied == ["a", "b", "c"]
    watching.round()
    assert rebalanced == ["a", "b", "c"], "only every REBALANCE_S"


def test_a_database_that_is_away_when_the_watch_begins_is_tried_again(watching, follows, clock, monkeypatch):
    def away():
        raise OperationalError("connect", {}, Exception("connection refused"))

    with monkeypatch.context() as patch:
        patch.setattr(watch, "Audit", away)
        watching.round()
    assert follows.looked == []
    assert "connection refused" in watching.report().last_error
    clock.now += FIRST_DELAY_S
    watching.round()
    assert follows.looked == ["a", "b", "c"]


def test_a_model_that_is_taken_off_leaves_no_fault(clock, follows, audit):
    models = ["a", "b"]
    watching = Watch(lambda: models, clock, follows)
    follows.broken["b"] = RuntimeError("gone")
    watching.round()
    models.remove("b")
    watching.round()
    assert watching.report().faults == {}


def test_the_thread_looks_until_it_is_stopped(follows, audit, monkeypatch):
    monkeypatch.setattr(watch, "ROUND_S", 0.01)
    watching = Watch(lambda: ["a"], follower=follows)
    assert not watching.is_alive()
    watching.start()
    while not follows.looked:
        assert watching.is_alive()
    watching.stop()
    watching._thread.join()
    assert not watching.is_alive()
