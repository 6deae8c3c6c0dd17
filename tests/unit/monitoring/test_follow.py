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
def loaded(monkeypatch):
    """The entries that the replicas have loaded."""
    entries = []
    monkeypatch.setattr(follow, "refresh", lambda name, entry: entries.append(entry))
    monkeypatch.setattr(follow, "start_workers", lambda *_: None)
    monkeypatch.setattr(follow, "stop_unused_workers", lambda *_: None)
    return entries


@pytest.fixture
def follower():
    return Follower()


def follow_registry(audit, follower):
    """Let the follower compare the endpoint with the registry once; returns the traffic after that."""
    follower.follow(audit, "income", traffic.read_current(audit, "income"))
    return traffic.read_current(audit, "income").traffic


def test_a_version_that_gets_the_alias_is_deployed_with_the_current_weights(audit, aliases, loaded, follower):
    aliases["challenger"] = "2"
    deployed = registered_traffic("income", SERVING)[0]
    reweighted = traffic.with_weights(deployed, {"champion": 50, "challenger": 50})
    place(audit, "income", reweighted, SERVING)
    follow_registry(audit, follower)
    assert loaded == [], "nothing has changed"
    aliases["champion"] = "3"
    current = follow_registry(audit, follower)
    assert current.variants["champion"].version == "3"
    assert current.weights == {"champion": 50, "challenger": 50}
    assert (loaded, audit.entries()[-1].who) == ([2], AUTHOR)


def test_a_copy_of_a_bundle_on_another_machine_is_the_same_version(audit, aliases, loaded, follower):
    deployed = registered_traffic("income", SERVING)[0]
    elsewhere = {
        name: variant.model_copy(update={"path": Path("/another/machine") / name})
        for name, variant in deployed.variants.items()
    }
    place(audit, "income", deployed.model_copy(update={"variants": elsewhere}), SERVING)
    assert follow_registry(audit, follower).variants == elsewhere
    assert (loaded, follower.faults) == ([], {})
    aliases["champion"] = "2"
    assert follow_registry(audit, follower).variants["champion"].version == "2"


def test_a_broken_version_is_a_fault_and_the_current_version_stays(audit, aliases, loaded, follower):
    place(audit, "income", registered_traffic("income", SERVING)[0], SERVING)
    aliases["champion"] = "3"
    (versions.find("income", "champion").path / "model.onnx").write_bytes(b"")
    for _ in range(2):
        assert follow_registry(audit, follower).variants["champion"].version == "1"
        assert "model.onnx was changed" in follower.faults["income"]
    aliases["champion"] = "1"
    follow_registry(audit, follower)
    assert follower.faults == {}


def test_a_version_that_the_replicas_cannot_load_is_rolled_back_and_retried_with_growing_delays(
    audit, aliases, loaded, monkeypatch
):
    place(audit, "income", registered_traffic("income", SERVING)[0], SERVING)
    attempts, now = [], [0.0]

    def fail_twice(name, entry):
        attempts.append(entry)
        if len(attempts) < 3:
            raise UserError("the replicas cannot load it")

    monkeypatch.setattr(follow, "refresh", fail_twice)
    aliases["champion"] = "2"
    follower = Follower(clock=lambda: now[0])
    for _ in range(3):
        assert follow_registry(audit, follower).variants["champion"].version == "1"
    assert len(attempts) == 1, "not retried before the delay has passed"
    now[0] += FIRST_DELAY_S
    follow_registry(audit, follower)
    now[0] += FIRST_DELAY_S
    assert follow_registry(audit, follower).variants["champion"].version == "1"
    assert len(attempts) == 2, "the second delay is longer"
    now[0] += FIRST_DELAY_S
    assert follow_registry(audit, follower).variants["champion"].version == "2"
    assert follower.faults == {}


def test_aliases_that_leave_no_weight_are_a_fault_and_the_current_versions_stay(
    audit, aliases, loaded, follower
):
    aliases["challenger"] = "2"
    deployed = registered_traffic("income", SERVING)[0]
    current = traffic.with_weights(deployed, {"champion": 0, "challenger": 100})
    place(audit, "income", current, SERVING)
    aliases["champion"] = aliases.pop("challenger")  # as `promote` does
    for _ in range(2):
        assert follow_registry(audit, follower) == current
        assert "must have a weight above 0, and none has" in follower.faults["income"]
    assert loaded == []
    raised = traffic.with_weights(current, {"champion": 1})
    traffic.update(audit, "income", traffic.read_current(audit, "income"), raised)
    assert follow_registry(audit, follower).weights == {"champion": 1}
    assert follower.faults == {}


def test_an_endpoint_that_somebody_is_changing_is_skipped(audit, aliases, loaded, follower):
    place(audit, "income", registered_traffic("income", SERVING)[0], SERVING)
    aliases["champion"] = "2"
    with traffic.endpoint_lock("income"):
        assert follow_registry(audit, follower).variants["champion"].version == "1"
    assert follower.faults == {}
    outdated = traffic.read_current(audit, "income")
    deployed = registered_traffic("income", SERVING)[0].model_copy(update={"salt": "other"})
    place(audit, "income", deployed, SERVING)
    follower.follow(audit, "income", outdated)
    assert traffic.read_current(audit, "income").traffic == deployed
