import pytest
import ray
from ray.exceptions import RayError

from app.errors import UserError
from app.serving.control import grpc_server, server
from app.serving.control.root import Root
from app.serving.gateway import preflight, settings
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.serving.names import ROOT


def make_gateway(port=8000, max_wait_s=10.0):
    frontend = Frontend(host="127.0.0.1", port=port, certificate=None, key=None, grpc_port=None)
    return Gateway(frontend, {"income": Backend(None, max_wait_s, 1000)})


@pytest.fixture
def events(monkeypatch):
    """The steps that start a server, in order. A test may replace each of them."""
    events = []
    monkeypatch.setattr(server, "_start_or_reload", lambda frontend: events.append(("start", frontend.port)))
    monkeypatch.setattr(grpc_server, "update", lambda gateway, previous: events.append(("grpc", previous)))
    monkeypatch.setattr(server, "_reload", lambda: events.append("reload"))
    return events


def test_the_settings_are_written_before_haproxy_starts(events, monkeypatch):
    gateway = make_gateway()
    monkeypatch.setattr(server, "_start_or_reload", lambda frontend: events.append(settings.read()))
    server.open_gateway(gateway)
    assert events == [gateway, ("grpc", None)]
    assert settings.read() == gateway


def test_the_previous_settings_are_restored_and_loaded_if_the_new_ones_fail(events, monkeypatch):
    server.open_gateway(make_gateway(max_wait_s=10.0))

    def refuse(gateway, previous):
        raise UserError("the gRPC server cannot start")

    monkeypatch.setattr(grpc_server, "update", refuse)
    with pytest.raises(UserError, match="cannot start"):
        server.open_gateway(make_gateway(max_wait_s=20.0))
    assert settings.read() == make_gateway(max_wait_s=10.0)
    assert events[-1] == "reload"


def test_the_first_start_requires_a_free_port(monkeypatch):
    def refuse(host, port, setting):
        raise UserError(f"port {port} must be free ({setting})")

    monkeypatch.setattr(server, "is_running", lambda: False)
    monkeypatch.setattr(preflight, "require_free_port", refuse)
    monkeypatch.setattr(server, "_reload", lambda: None)
    with pytest.raises(UserError, match=r"port 8000 must be free \(serving.port\)"):
        server.open_gateway(make_gateway())
    assert settings.read() is None


@pytest.mark.parametrize(("num_nodes", "host"), [(1, "127.0.0.1"), (2, "0.0.0.0")])
def test_replicas_listen_on_all_interfaces_only_if_there_are_other_nodes(monkeypatch, num_nodes, host):
    started = []
    monkeypatch.setattr(server, "is_running", lambda: False)
    monkeypatch.setattr(preflight, "require_free_port", lambda *_: None)
    nodes = [{"Alive": number < num_nodes} for number in range(3)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr("ray.serve.start", lambda http_options: started.append(http_options))
    server._start_or_reload(make_gateway().frontend)
    assert started == [{"host": host, "port": 8000}]


class Controller:
    """Stands in for Serve's controller; a reload of a proxy returns the results in turn."""

    def __init__(self, *results):
        self.results, self.num_reloads = list(results), 0
        self._controller = self
        self.get_proxies = self._reload_haproxy = self

    def remote(self):
        return self


@pytest.fixture
def reload_results(monkeypatch):
    """Make each reload of HAProxy on the only node return or raise the next result."""

    def use(*results):
        controller = Controller()
        pending = list(results)

        def get(reference, timeout=None):
            if reference is controller:
                return {"node": controller, "fallback-node": None}
            result = pending.pop(0) if len(pending) > 1 else pending[0]
            controller.num_reloads += 1
            if result is not None:
                raise result
            return [None]

        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: controller)
        monkeypatch.setattr(server, "RETRY_S", 0.001)
        return controller

    return use


def test_haproxy_is_reloaded_again_after_it_has_died(reload_results):
    controller = reload_results(RayError("connection refused"), RayError("connection refused"), None)
    server._reload()
    assert controller.num_reloads == 3


def test_a_setting_that_haproxy_refuses_is_in_the_error(reload_results):
    controller = reload_results(RayError("[NOTICE] x\n[ALERT] (7) : cannot bind 0.0.0.0:8000\nmore"))
    with pytest.raises(UserError, match=r"does not accept serving\.host.*cannot bind 0\.0\.0\.0:8000"):
        server._reload()
    assert controller.num_reloads == 1


def test_haproxy_that_stays_dead_is_an_error(reload_results, monkeypatch):
    monkeypatch.setattr(server, "RELOAD_TIMEOUT_S", 0.05)
    reload_results(RayError("connection refused"))
    with pytest.raises(UserError, match="it does not run; see Ray Serve's logs"):
        server._reload()


def test_nothing_is_reloaded_if_serve_does_not_run(monkeypatch):
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: None)
    server._reload()
    assert not server.is_running()


def test_stop_waits_for_the_end_of_the_controller(fake_serve, monkeypatch):
    polls = []

    def get_actor(name, namespace):
        polls.append((name, namespace))
        if len(polls) > 2:
            raise ValueError("no such actor")

    monkeypatch.setattr(ray, "get_actor", get_actor)
    server.stop()
    assert len(polls) == 3
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.0)
    with pytest.raises(UserError, match="must shut down within 0 s"):
        server.stop()


def test_the_root_runs_without_a_cpu_and_restarts_to_hide_models(fake_serve):
    versions = set()
    for hides_models in (False, True):
        server.start_root(hides_models)
        deployment = fake_serve.bound[ROOT]
        assert (deployment.func_or_class, deployment.init_args) == (Root, (hides_models,))
        assert deployment.ray_actor_options["num_cpus"] == 0
        versions.add(deployment.version)
    assert len(versions) == 2
    assert fake_serve.events == 2 * [("run", ROOT, "/")]
