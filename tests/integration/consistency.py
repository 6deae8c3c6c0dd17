"""Checks that a model's versions, audit log and endpoint agree, after commands were killed or ran at once."""

import json
import time

import httpx

from app.bundle.manifest import verify
from app.registry import promotion, versions
from app.serving.control import replicas, status
from app.serving.traffic import traffic
from app.state.audit import Audit

SETTLE_S = 120
"""Maximum time until the watch and Serve have applied a change."""


def check_log_and_registry(name: str) -> None:
    """Each version is registered once and verifies, and the aliases are those of the last promotion."""
    with Audit() as audit:
        entries = audit.entries()
        assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
        promotion.finish(audit, name)
        promoted = audit.last(name, (promotion.PROMOTED,))
    registered_versions = versions.versions(name)
    champions = [str(v.version) for v in registered_versions if versions.CHAMPION in v.aliases]
    challengers = [str(v.version) for v in registered_versions if versions.CHALLENGER in v.aliases]
    assert champions == [promoted.details["version"] if promoted else "1"]
    assert len(challengers) <= 1
    assert champions != challengers
    registered = [e.details["version"] for e in entries if (e.model, e.action) == (name, "register")]
    numbers = sorted((str(v.version) for v in registered_versions), key=int)
    assert sorted(registered, key=int) == numbers, "a version is registered twice, or never"
    for version in registered_versions:
        verify(versions.resolve(name, str(version.version)).path)


def check_endpoint(name: str) -> traffic.TrafficEntry | None:
    """The endpoint serves the log's traffic with the current champion, or is undeployed; no worker is left.

    Returns the current entry, or None.
    """
    from ray import serve
    from ray.serve.context import _set_global_client

    _set_global_client(None)  # another process may have ended the controller of this process's client
    deadline = time.monotonic() + SETTLE_S
    while True:
        applications = serve.status().applications
        with Audit() as audit:
            entry = traffic.read_current(audit, name)
        if entry is None:
            assert not [other for other in applications if other.partition("@")[0] == name]
            return None
        states = replicas.broadcast(name, name, "state")
        champion = versions.resolve(name, versions.CHAMPION).number
        settled = entry.traffic.variants["champion"].version == champion
        settled = settled and all(state.entry == entry.number for state in states)
        if settled or time.monotonic() > deadline:
            break
        time.sleep(1)
    faults = [endpoint.faults for endpoint in status.read_endpoints() if endpoint.name == name]
    assert settled, (entry, states, faults)
    needed = {v.workers for v in entry.traffic.variants.values()} - {None}
    assert {other for other in applications if other.startswith(f"{name}@")} == needed
    assert entry.serving is not None
    row = json.loads((versions.resolve(name, "champion").path / "example.json").read_text())["rows"][0]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{entry.serving.port}", trust_env=False, timeout=60
    ) as client:
        response = client.post(f"/v2/models/{name}/predict", json={"rows": [row]})
    assert response.status_code == 200, response.text
    return entry
