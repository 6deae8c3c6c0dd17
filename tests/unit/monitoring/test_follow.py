from pathlib import Path

import pytest

from app.bundle import copies
from app.config import Serving
from app.errors import UserError
from app.monitoring import follow
from app.monitoring.follow import AUTHOR, Follower
from app.registry import versions
from app.registry.versions import Version
from app.serving.backoff import FIRST_DELAY_S
from app.serving.traffic import traffic
from app.serving.traffic.registered import registered_traffic
from app.state.audit import Audit
from tests.bundles import build
from tests.traffics import place

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
def aliases(monkeypatch, tmp_path):
    """The registry's versions by alias; a test changes them."""
    versions_by_alias = {"champion": "1"}
    identities = {number: copies.keep(build(tmp_path / number, seed=int(number))).name for number in "123"}

    def find(name, alias):
        if alias not in versions_by_alias:
            return None
        return Version(name, versions_by_alias[alias], (alias,), identities[versions_by_alias[alias]])

    monkeypatch.setattr(versions, "find", find)
    return versions_by_alias


@pytest.fixture
def taken(monkeypatch):
    """The entries that the replicas were told of."""
    seen = []
    monkeypatch.setattr(follow, "refresh", lambda name, entry: seen.append(entry))
    monkeypatch.setattr(follow, "start_workers", lambda *_: None)
    monkeypatch.setattr(follow, "stop_workers", lambda *_: None)
    return seen


def looked(audit, follower):
    follower.follow(audit, "income", traffic.read_current(audit, "income"))
    return traffic.read_current(audit, "income").traffic


def test_a_version_that_gets_the_alias_is_served_with_the_weights_that_hold(audit, aliases, taken):
    aliases["challenger"] = "2"
    deployed = registered_traffic("income", SERVING)[0]
    reweighted = traffic.with_weights(deployed, {"champion": 50, "challenger": 50})
    place(audit, "income", reweighted, SERVING)
    follower = Follower()
    looked(audit, follower)
    assert taken == [], "nothing has changed"
    aliases["champion"] = "3"
    held = looked(audit, follower)
    assert held.variants["champion"].version == "3"
    assert held.weights == {"champion": 50, "challenger": 50}
    assert (taken, audit.entries()[-1].who) == ([2], AUTHOR)


def test_a_copy_of_a_bundle_elsewhere_is_no_other_version(audit, aliases, taken):
    deployed = registered_traffic("income", SERVING)[0]
    elsewhere = {
        name: variant.model_copy(update={"path": Path("/another/machine") / name})
        for name, variant in deployed.variants.items()
    }
    place(audit, "income", deployed.model_copy(update={"variants": elsewhere}), SERVING)
    follower = Follower()
    assert looked(audit, follower).variants == elsewhere
    assert (taken, follower.faults) == ([], {})
    aliases["champion"] = "2"
    assert looked(audit, follower).variants["champion"].version == "2"


def test_a_broken_version_is_a_fault_and_what_is_served_goes_on(audit, aliases, taken):
    place(audit, "income", registered_traffic("income", SERVING)[0], SERVING)
    aliases["champion"] = "3"
    (versions.find("income", "champion").path / "model.onnx").write_bytes(b"")
    follower = Follower()
    for _ in range(2):
        assert looked(audit, follower).variants["champion"].version == "1"
        assert "model.onnx was changed" in follower.faults["income"]
    aliases["champion"] = "1"
    looked(audit, follower)
    assert follower.faults == {}


def test_a_version_that_the_replicas_cannot_take_is_taken_back_and_tried_again_later(
    audit, aliases, taken, monkeypatch
):
    place(audit, "income", registered_traffic("income", SERVING)[0], SERVING)
    tried, now = [], [0.0]

    def refuse(name, entry):
        tried.append(entry)
        if len(tried) < 3:
            raise UserError("the replicas do not take it in")

    monkeypatch.setattr(follow, "refresh", refuse)
    aliases["champion"] = "2"
    follower = Follower(clock=lambda: now[0])
    for _ in range(3):
        assert looked(audit, follower).variants["champion"].version == "1"
    assert len(tried) == 1, "it is not tried again and again"
    now[0] += FIRST_DELAY_S
    looked(audit, follower)
    now[0] += FIRST_DELAY_S
    assert looked(audit, follower).variants["champion"].version == "1"
    assert len(tried) == 2, "each time later"
    now[0] += FIRST_DELAY_S
    assert looked(audit, follower).variants["champion"].version == "2"
    assert follower.faults == {}


def test_aliases_that_leave_nobody_to_answer_are_a_fault_and_what_is_served_goes_on(audit, aliases, taken):
    aliases["challenger"] = "2"
    deployed = registered_traffic("income", SERVING)[0]
    held = traffic.with_weights(deployed, {"champion": 0, "challenger": 100})
    place(audit, "income", held, SERVING)
    aliases["champion"] = aliases.pop("challenger")  # as `promote` does
    follower = Follower()
    for _ in range(2):
        assert looked(audit, follower) == held
        assert "no variant with a weight above 0" in follower.faults["income"]
    assert taken == []
    raised = traffic.with_weights(held, {"champion": 1})
    traffic.update(audit, "income", traffic.read_current(audit, "income"), raised)
    assert looked(audit, follower).weights == {"champion": 1}
    assert follower.faults == {}


def test_an_endpoint_that_somebody_is_changing_is_left_alone(audit, aliases, taken):
    place(audit, "income", registered_traffic("income", SERVING)[0], SERVING)
    aliases["champion"] = "2"
    follower = Follower()
    with traffic.endpoint_lock("income"):
        assert looked(audit, follower).variants["champion"].version == "1"
    assert follower.faults == {}
    read = traffic.read_current(audit, "income")
    deployed = registered_traffic("income", SERVING)[0].model_copy(update={"salt": "other"})
    place(audit, "income", deployed, SERVING)
    follower.follow(audit, "income", read)
    assert traffic.read_current(audit, "income").traffic == deployed
