import pytest

from app import registry
from app.audit import Audit
from app.config import Serving
from app.errors import UserError
from app.registry import Version
from app.serving import follow, traffic
from app.serving.follow import WHO, Follower
from tests.bundles import build

SERVING = Serving.model_validate(
    {
        "follow": True,
        "variants": {
            "champion": {"version": "champion", "weight": 80},
            "challenger": {"version": "challenger", "weight": 20},
        },
    }
)


@pytest.fixture
def audit():
    audit = Audit()
    yield audit
    audit.close()


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """What the registry has: aliases with their versions, to be changed by the test."""
    held = {"champion": "1"}
    for number in "123":
        build(tmp_path / number, seed=int(number))

    def find(name, alias):
        if alias not in held:
            return None
        return Version(name, held[alias], (alias,), tmp_path / held[alias])

    monkeypatch.setattr(registry, "find", find)
    return held


@pytest.fixture
def taken(monkeypatch):
    """The entries that the replicas were told of."""
    seen = []
    monkeypatch.setattr(follow, "refresh", lambda name, entry: seen.append(entry))
    monkeypatch.setattr(follow, "start_workers", lambda *_: None)
    monkeypatch.setattr(follow, "stop_workers", lambda *_: None)
    return seen


def test_a_variant_without_a_version_is_left_out(registered):
    found, notes = follow.registered("income", SERVING)
    assert found.weights == {"champion": 80}
    assert "challenger" in notes[0]
    registered.clear()
    with pytest.raises(UserError, match="train one first"):
        follow.registered("income", SERVING)


def test_a_version_that_gets_the_alias_is_served_with_the_weights_that_hold(audit, registered, taken):
    registered["challenger"] = "2"
    deployed = follow.registered("income", SERVING)[0]
    traffic.change(audit, "income", traffic.reweighted(deployed, {"champion": 50, "challenger": 50}))
    follower = Follower()
    follower.look(audit, "income", SERVING)
    assert taken == [], "nothing has changed"
    registered["champion"] = "3"
    follower.look(audit, "income", SERVING)
    held = traffic.current(audit, "income")[1]
    assert held.variants["champion"].version == "3"
    assert held.weights == {"champion": 50, "challenger": 50}
    assert (taken, audit.entries()[-1].who) == ([2], WHO)


def test_a_broken_version_is_named_once_and_what_is_served_goes_on(audit, registered, taken, tmp_path):
    traffic.change(audit, "income", follow.registered("income", SERVING)[0])
    (tmp_path / "3" / "model.onnx").write_bytes(b"")
    registered["champion"] = "3"
    follower = Follower()
    for _ in range(2):
        follower.look(audit, "income", SERVING)
        assert "model.onnx was changed" in follower.faults["income"]
    assert traffic.current(audit, "income")[1].variants["champion"].version == "1"
    registered["champion"] = "1"
    follower.look(audit, "income", SERVING)
    assert follower.faults == {}


def test_a_version_that_the_replicas_cannot_take_is_taken_back(audit, registered, taken, monkeypatch):
    traffic.change(audit, "income", follow.registered("income", SERVING)[0])
    tried = []

    def refuse(name, entry):
        tried.append(entry)
        raise UserError("the replicas do not take it in")

    monkeypatch.setattr(follow, "refresh", refuse)
    registered["champion"] = "2"
    follower = Follower()
    for _ in range(3):
        follower.look(audit, "income", SERVING)
    assert len(tried) == 1, "it is not tried again and again"
    assert traffic.current(audit, "income")[1].variants["champion"].version == "1"
