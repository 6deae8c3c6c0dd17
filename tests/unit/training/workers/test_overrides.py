"""Overrides that Ray does not call are reported. Ray's side is simulated."""

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig

from app.state import hooks
from app.training.workers import elastic, launch, overrides, progress

IN_CONTROLLER = ["Group._get_worker_runtime_env"]
IN_ELASTIC_CONTROLLER = [
    "FreeResources._get_reserved_resources",
    "FreeResources.make_decision_for_non_running_worker_group",
]
IN_BOTH = sorted(IN_CONTROLLER + IN_ELASTIC_CONTROLLER)
IN_DRIVER = ["Trainer._create_default_callbacks", "Trainer._initialize_and_run_controller"]


@pytest.fixture(autouse=True)
def no_calls(monkeypatch):
    """No override was called in this process before."""
    monkeypatch.setattr(overrides, "_called", set())


class Actor:
    """Stands in for the progress actor: the controller reports events, the listener gets them."""

    def __init__(self):
        self._events = []
        self.report = SimpleNamespace(remote=lambda *event: self._events.append(event))
        self.events = SimpleNamespace(remote=lambda start, timeout_s: self._events[start:])


@pytest.fixture
def listener(monkeypatch):
    """A listener whose actor is in this process."""
    options = SimpleNamespace(remote=Actor)
    monkeypatch.setattr(progress, "_Progress", SimpleNamespace(options=lambda **_: options))
    monkeypatch.setattr(progress.ray, "get", lambda events: events)
    context = SimpleNamespace(get_node_id=lambda: "0" * 56)
    monkeypatch.setattr(progress.ray, "get_runtime_context", lambda: context)
    return progress.Listener(print, print)


def start_group(actor: Actor, is_elastic: bool) -> None:
    """Do what Ray's controller does once the workers have started."""
    state = SimpleNamespace(placement_group_handle=SimpleNamespace(placement_group=None))
    group = SimpleNamespace(get_worker_group_state=lambda: state)
    elastic.Transitions(actor, is_elastic).after_worker_group_start(group)


def test_overrides_that_ray_has_not_called_are_listed_by_caller():
    assert overrides.not_called("driver") == IN_DRIVER
    assert overrides.not_called("controller") == IN_CONTROLLER
    assert overrides.not_called("controller", "elastic controller") == IN_BOTH
    assert launch.Group._get_worker_runtime_env({"a": 1}) == {"a": 1}
    assert overrides.not_called("controller") == []


def test_a_group_that_starts_with_all_overrides_reports_none(listener, monkeypatch):
    monkeypatch.setattr(elastic, "RELEASE_S", 0.0)
    monkeypatch.setattr(elastic.FreeResources, "_maybe_send_resource_request", lambda self: None)
    state = SimpleNamespace(available_resources_per_node=dict, get_draining_nodes=dict)
    monkeypatch.setattr(elastic.ray._private.state, "state", state)
    launch.Group._get_worker_runtime_env({})
    elastic.FreeResources(ScalingConfig(num_workers=(1, 2))).make_decision_for_non_running_worker_group()
    start_group(listener.actor, is_elastic=True)
    assert listener.not_called() == []


def test_a_group_that_starts_without_an_override_reports_it(listener):
    start_group(listener.actor, is_elastic=False)
    assert listener.not_called() == IN_CONTROLLER
    start_group(listener.actor, is_elastic=True)
    assert listener.not_called() == IN_BOTH


def test_a_group_that_starts_without_the_callback_is_reported(listener):
    assert listener.not_called() == ["Transitions.after_worker_group_start"]


def test_overrides_that_were_not_called_are_logged_reported_and_recorded(caplog):
    notes = []
    overrides.report(["Trainer._create_default_callbacks"], notes.append)
    assert "Ray Train did not call Trainer._create_default_callbacks" in notes[0]
    assert notes[0] in caplog.text
    assert list(hooks.reported()) == ["training: Ray Train did not call Trainer._create_default_callbacks"]
    overrides.report([], notes.append)
    assert list(hooks.reported()) == []
    assert len(notes) == 1
