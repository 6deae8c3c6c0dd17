from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from app.errors import UserError
from app.serving.control import replicas
from app.serving.control.replicas import MAX_ATTEMPTS, broadcast, refresh, try_broadcast


class Answers:
    """Replaces `broadcast`: raises or returns the results in turn, and then repeats the last one."""

    def __init__(self, *results):
        self.results, self.num_calls = results, 0

    def __call__(self, *_):
        result = self.results[min(self.num_calls, len(self.results) - 1)]
        self.num_calls += 1
        if isinstance(result, Exception):
            raise result
        return result


def state(entry, fault=None):
    return SimpleNamespace(entry=entry, fault=fault)


def test_a_refresh_succeeds_if_every_replica_has_loaded_the_entry_or_a_later_one(monkeypatch):
    monkeypatch.setattr(replicas, "broadcast", Answers([state(7), state(8)]))
    refresh("income", 7)


def test_the_reasons_why_replicas_cannot_load_an_entry_are_in_the_error(monkeypatch):
    answers = Answers([state(7), state(6, "model.onnx was changed"), state(6, "model.onnx was changed")])
    monkeypatch.setattr(replicas, "broadcast", answers)
    with pytest.raises(UserError, match=r"cannot load the new traffic: model\.onnx was changed\. They keep"):
        refresh("income", 7)


def test_a_refresh_is_sent_again_if_a_replica_dies(monkeypatch):
    answers = Answers(RayActorError(), RayActorError(), [state(7)])
    monkeypatch.setattr(replicas, "broadcast", answers)
    refresh("income", 7)
    assert answers.num_calls == 3


def test_a_refresh_fails_if_replicas_keep_dying_or_do_not_answer(monkeypatch):
    answers = Answers(RayActorError())
    monkeypatch.setattr(replicas, "broadcast", answers)
    with pytest.raises(UserError, match="do not answer"):
        refresh("income", 7)
    assert answers.num_calls == MAX_ATTEMPTS
    monkeypatch.setattr(replicas, "broadcast", Answers(TimeoutError()))
    with pytest.raises(UserError, match="must answer within 120 s"):
        refresh("income", 7)


def test_try_broadcast_has_no_results_if_the_replicas_do_not_answer(monkeypatch):
    for error in (TimeoutError(), RayActorError()):
        monkeypatch.setattr(replicas, "broadcast", Answers(error))
        assert try_broadcast("income", "income", "state") == []
    monkeypatch.setattr(replicas, "broadcast", Answers([state(1)]))
    assert try_broadcast("income", "income", "state") == [state(1)]


def test_a_handle_is_closed_after_the_call(monkeypatch):
    events = []

    class Handle:
        def __init__(self, deployment, application):
            events.append((application, deployment))

        def _init(self, **options):
            assert options == {"_run_router_in_separate_loop": True}

        def broadcast(self, method):
            return SimpleNamespace(results=lambda timeout_s: events.append((method, timeout_s)) or ["result"])

        def shutdown(self):
            events.append("shutdown")

    monkeypatch.setattr("ray.serve.handle.DeploymentHandle", Handle)
    assert broadcast("income@1", "worker", "state", 5.0) == ["result"]
    assert events == [("income@1", "worker"), ("state", 5.0), "shutdown"]
