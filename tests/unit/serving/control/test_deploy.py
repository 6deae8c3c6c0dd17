import shlex

import orjson
import pytest

from app.config import Serving
from app.errors import UserError
from app.serving.control import deploy as deployments
from app.serving.control import server
from app.serving.control.deploy import deploy, example_command
from app.serving.gateway import preflight, settings
from app.serving.replica.deployment import Replica
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state import shared
from app.state.audit import Audit
from tests.bundles import ROWS, build

URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bundles") / "1", seed=1)


def make_serving(**values):
    document = {"port": 8000, "variants": {"champion": {"version": "1", "weight": 1}}, **values}
    return Serving.model_validate(document)


def make_traffic(path, **values):
    variant = DeployedVariant(version="1", weight=1, path=path, **values)
    return Traffic(salt="1", policy="weighted", variants={"champion": variant})


@pytest.fixture
def audit():
    with Audit() as audit:
        yield audit


@pytest.fixture(autouse=True)
def cluster(monkeypatch, fake_serve):
    """A cluster of one node. Events of the server are added to those of `fake_serve`."""
    events = fake_serve.events

    def open_gateway(gateway):
        with settings.applied(gateway):
            events.append(("gateway", gateway.frontend.grpc_port, gateway.backends["income"].secured))

    monkeypatch.setattr(server, "open_gateway", open_gateway)
    monkeypatch.setattr(server, "start_root", lambda hides_models: events.append(("root", hides_models)))
    monkeypatch.setattr(server, "stop", fake_serve.shutdown)
    monkeypatch.setattr(server, "num_nodes", lambda: 1)
    monkeypatch.setattr(server, "is_running", lambda: bool(fake_serve.applications))
    monkeypatch.setattr(shared, "require_shared", lambda: None)
    monkeypatch.setattr(preflight, "check_files", lambda serving: None)
    monkeypatch.setattr(deployments, "_wait_until_ready", lambda url, name: events.append(("ready", url)))
    monkeypatch.setattr(deployments, "refresh", lambda name, entry: events.append(("refresh", entry)))


def test_a_first_endpoint_starts_the_server_then_the_monitoring_then_the_replicas(fake_serve, audit, bundle):
    events = fake_serve.events
    url = deploy(
        make_serving(), "income", make_traffic(bundle), start_monitoring=lambda: events.append("monitoring")
    )
    assert url == URL
    assert events == [
        ("gateway", None, False),
        ("root", False),
        "monitoring",
        ("run", "income", "/v2/models/income"),
        ("ready", URL),
        ("refresh", 1),
    ]
    assert traffics.read_current(audit, "income").traffic == make_traffic(bundle)
    deployment = fake_serve.bound["income"]
    assert (deployment.func_or_class, deployment.init_args[0]) == (Replica, "income")


def test_a_change_of_traffic_does_not_restart_replicas_and_other_settings_do(fake_serve, bundle):
    def version(**values):
        deploy(make_serving(**values), "income", make_traffic(bundle))
        return fake_serve.bound["income"].version

    first = version()
    assert version(salt="other", autoscaling={"max_replicas": 7}) == first
    assert version(limits={"max_rows": 7}) != first


def test_the_gateway_widens_only_after_tokens_are_required(fake_serve, bundle):
    deploy(make_serving(), "income", make_traffic(bundle))
    fake_serve.events.clear()
    deploy(make_serving(auth="local", grpc_port=9000), "income", make_traffic(bundle))
    steps = [event for event in fake_serve.events if event[0] in ("gateway", "root", "run")]
    assert steps == [
        ("gateway", None, False),
        ("root", True),
        ("run", "income", "/v2/models/income"),
        ("gateway", 9000, True),
        ("root", True),
    ]


def test_the_gateway_narrows_before_tokens_are_no_longer_required(fake_serve, bundle):
    deploy(make_serving(auth="local", grpc_port=9000), "income", make_traffic(bundle))
    fake_serve.events.clear()
    deploy(make_serving(), "income", make_traffic(bundle))
    steps = [event for event in fake_serve.events if event[0] in ("gateway", "root", "run")]
    assert steps[:3] == [
        ("gateway", None, False),
        ("root", True),
        ("run", "income", "/v2/models/income"),
    ]


def test_a_first_deployment_that_fails_leaves_no_server(fake_serve, audit, bundle, monkeypatch):
    def fail(name, entry):
        raise UserError("cannot load")

    monkeypatch.setattr(deployments, "refresh", fail)
    with pytest.raises(UserError, match="cannot load"):
        deploy(make_serving(), "income", make_traffic(bundle))
    assert fake_serve.applications == {}
    assert (settings.read(), traffics.read_current(audit, "income")) == (None, None)


def test_a_replacement_that_fails_leaves_the_endpoint(fake_serve, audit, bundle, monkeypatch):
    def fail(name, entry):
        raise UserError("cannot load")

    deploy(make_serving(), "income", make_traffic(bundle))
    monkeypatch.setattr(deployments, "refresh", fail)
    with pytest.raises(UserError, match="cannot load"):
        deploy(make_serving(salt="other"), "income", make_traffic(bundle, workers="income@1"))
    assert set(fake_serve.applications) == {"income"}, "the new workers are stopped"
    assert traffics.read_current(audit, "income").traffic == make_traffic(bundle)


def test_a_broken_bundle_is_refused_before_the_server_is_touched(fake_serve, tmp_path):
    path = build(tmp_path / "broken", seed=1)
    (path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="was changed"):
        deploy(make_serving(), "income", make_traffic(path))
    assert fake_serve.events == []


def test_a_body_must_not_be_larger_than_haproxys_limit(fake_serve, bundle):
    serving = make_serving()
    limits = serving.limits.model_copy(update={"max_body_bytes": 10**12})
    with pytest.raises(UserError, match=r"serving\.limits\.max_body_bytes must be at most"):
        deploy(serving.model_copy(update={"limits": limits}), "income", make_traffic(bundle))


def test_the_example_command_predicts_a_stored_row(bundle):
    variant = DeployedVariant(version="1", weight=1, path=bundle)
    program, _, url, *_, body = shlex.split(example_command(URL, "income", variant))
    assert (program, url) == ("curl", f"{URL}/v2/models/income/predict")
    document = orjson.loads(body)
    assert (document["unit"], document["rows"]) == ("user-17", ROWS[:1])
