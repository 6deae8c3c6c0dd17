from types import SimpleNamespace

import pytest

from app.jobs import serve
from app.state import hooks

ENDPOINTS = {"income": [], "flights": ["no replica"]}


@pytest.fixture
def endpoints(monkeypatch):
    def endpoint(name, faults):
        return SimpleNamespace(name=name, document=lambda: {"name": name, "faults": faults})

    all_endpoints = [endpoint(name, faults) for name, faults in ENDPOINTS.items()]
    monkeypatch.setattr(serve.status, "read_endpoints", lambda: all_endpoints)


def test_endpoints_without_monitoring(endpoints, monkeypatch):
    monkeypatch.setattr(serve.monitor, "report", lambda: None)
    assert serve.statuses() == [
        {"name": "income", "faults": [], "watch": None, "hooks": []},
        {"name": "flights", "faults": ["no replica"], "watch": None, "hooks": []},
    ]


def test_the_faults_of_monitoring_are_added(endpoints, monkeypatch):
    report = SimpleNamespace(
        round_ended_s_ago=1.0, num_failures=2, last_error="away", faults={"flights": "has not been checked"}
    )
    monkeypatch.setattr(serve.monitor, "report", lambda: report)
    income, flights = serve.statuses()
    assert income["faults"] == []
    assert flights["faults"] == ["has not been checked", "no replica"]
    assert flights["watch"] == {"looked_s_ago": 1.0, "failures": 2, "last_error": "away"}


def test_hooks_without_effect_are_in_the_status_of_every_endpoint(endpoints, monkeypatch):
    monkeypatch.setattr(serve.monitor, "report", lambda: None)
    hooks.report("training", ["Ray Train did not call a hook"])
    assert [document["hooks"] for document in serve.statuses()] == [
        ["training: Ray Train did not call a hook"]
    ] * 2
