"""Whether a model's versions, log and endpoint are whole, after commands were killed or ran at once."""

import json
import time

import httpx

from app.bundle.manifest import verify
from app.registry import promotion, versions
from app.serving.control import replicas, status
from app.serving.traffic import traffic
from app.state.audit import Audit

SETTLE_S = 120
"""For the watch, or Serve, to take in what was changed; seconds."""


def check_log_and_registry(name: str) -> None:
    """Each version is registered once and verifies, and the aliases are those that were given last."""
    with Audit() as audit:
        entries = audit.entries()
        assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
        promotion.finish(audit, name)
        promoted = audit.last(name, (promotion.PROMOTED,))
    found = versions.versions(name)
    champions = [str(v.version) for v in found if versions.CHAMPION in v.aliases]
    challengers = [str(v.version) for v in found if versions.CHALLENGER in v.aliases]
    assert champions == [promoted.details["version"] if promoted else "1"]
    assert len(challengers) <= 1
    assert champions != challengers
    registered = [e.details["version"] for e in entries if (e.model, e.action) == (name, "register")]
    assert sorted(registered, key=int) == sorted((str(v.version) for v in found), key=int), "each once"
    for version in found:
        verify(versions.resolve(name, str(version.version)).path)


def check_endpoint(name: str) -> traffic.TrafficEntry | None:
    """It serves what the log says, with the champion of now, or is off; no worker runs that nobody needs."""
    from ray import serve
    from ray.serve.context import _set_global_client

    _set_global_client(None)  # another process may have ended the controller that this one knows
    deadline = time.monotonic() + SETTLE_S
    while True:
        applications = serve.status().applications
        with Audit() as audit:
            held = traffic.read_current(audit, name)
        if held is None:
            assert not [other for other in applications if other.partition("@")[0] == name]
            return None
        states = replicas.broadcast(name, name, "state")
        champion = versions.resolve(name, versions.CHAMPION).number
        settled = held.traffic.variants["champion"].version == champion
        settled = settled and all(state.entry == held.number for state in states)
        if settled or time.monotonic() > deadline:
            break
        time.sleep(1)
    faults = [endpoint.faults for endpoint in status.read_endpoints() if endpoint.name == name]
    assert settled, (held, states, faults)
    needed = {v.workers for v in held.traffic.variants.values()} - {None}
    assert {other for other in applications if other.startswith(f"{name}@")} == needed
    assert held.serving is not None
    row = json.loads((versions.resolve(name, "champion").path / "example.json").read_text())["rows"][0]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{held.serving.port}", trust_env=False, timeout=60
    ) as client:
        response = client.post(f"/v2/models/{name}/predict", json={"rows": [row]})
    assert response.status_code == 200, response.text
    return held
