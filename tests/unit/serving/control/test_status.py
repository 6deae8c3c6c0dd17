import json

import pytest

from app.serving.control import status
from app.serving.control.status import NumReplicas, application_statuses, read_endpoints
from app.serving.replica.meters import RequestStats
from app.serving.replica.recorder import RecorderStatus
from app.serving.replica.state import State
from app.serving.traffic import traffic as traffics
from app.state.audit import Audit
from tests.traffics import place
from tests.unit.serving.traffic.test_traffic import SERVING, make_traffic


def make_state(entry=1, fault=None, num_requests=0, recording=None, **shadows):
    recent = {"champion": RequestStats(num_requests, 0)} if num_requests else {}
    if num_requests:
        recent["champion"].latencies[0] = num_requests
    return State(
        entry=entry,
        fault=fault,
        versions={"champion": "1", "challenger": "2"},
        weights={"champion": 75.0, "challenger": 25.0},
        recording=recording,
        shadows=shadows,
        recent=recent,
    )


@pytest.fixture
def audit():
    with Audit() as audit:
        yield audit


@pytest.fixture
def states(monkeypatch):
    """The states that the replicas return, by application."""
    states = {}
    monkeypatch.setattr(status, "try_broadcast", lambda name, deployment, method: states.get(name, []))
    return states


def test_the_replicas_of_an_endpoint_are_added_up(fake_serve, audit, states):
    traffic = make_traffic(75, 25)
    heavy = traffic.variants["challenger"].model_copy(update={"workers": "income@2"})
    place(
        audit,
        "income",
        traffic.model_copy(update={"variants": {**traffic.variants, "challenger": heavy}}),
        SERVING,
    )
    fake_serve.add("income", RUNNING=2, STARTING=1, STOPPING=4)
    fake_serve.add("income@2", "worker", RUNNING=1)
    states["income"] = [
        make_state(num_requests=60, recording=RecorderStatus({"refused": 1}, 3, 300, None), dark=2),
        make_state(num_requests=60, recording=RecorderStatus({"refused": 1}, 4, 400, "locked"), dark=3),
    ]
    (endpoint,) = read_endpoints()
    document = endpoint.document()
    assert document["replicas"] == {"running": 2, "target": 3}
    assert (document["name"], document["status"], document["faults"]) == ("income", "RUNNING", [])
    champion, challenger, dark = document["variants"].values()
    assert (champion["version"], champion["share"], champion["requests_per_s"]) == ("1", 0.75, 2.0)
    assert (champion["p50_s"], champion["error_rate"]) == (1.0, 0.0)
    assert (challenger["requests_per_s"], challenger["p50_s"]) == (0.0, None)
    assert json.loads(json.dumps(challenger["workers"])) == [1, 1]
    assert (dark["shadow"], dark["share"], dark["workers"]) == (True, 0.0, None)
    assert document["not_recorded"] == 2
    assert document["recording"] == {
        "dropped": {"refused": 2},
        "waiting": 7,
        "waiting_bytes": 700,
        "faults": ["locked"],
    }
    assert document["not_shadowed"] == 5


def test_the_faults_of_the_replicas_and_of_the_traffic_are_named_once(fake_serve, audit, states):
    audit.add(traffics.TRAFFIC_ACTION, "income", {"of": "an older version"})
    fake_serve.add("income")
    states["income"] = [make_state(fault="model.onnx was changed")] * 2
    (endpoint,) = read_endpoints()
    assert endpoint.traffic is None
    unreadable, broken = endpoint.faults
    assert "cannot be read" in unreadable
    assert broken == "model.onnx was changed"
    assert endpoint.document()["variants"] == {}


def test_an_application_that_was_just_created_has_no_replicas(fake_serve, audit, states):
    place(audit, "income", make_traffic(), SERVING)
    fake_serve.add("income", "another deployment")
    (endpoint,) = read_endpoints()
    assert endpoint.target_num_replicas == 0
    assert status._num_replicas(fake_serve.applications["income"], "income") == NumReplicas(0, 0)


def test_only_models_are_endpoints(fake_serve, audit, states):
    for name in ("income", "income@1", "Raylway", "Grpc", "Watch"):
        fake_serve.add(name)
    assert application_statuses() == {"income": "RUNNING"}
    assert [endpoint.name for endpoint in read_endpoints()] == ["income"]
