"""`raylway status`, and what it shows beside the endpoints."""

from types import SimpleNamespace

from app.jobs import serve
from app.state import hooks
from tests.commands import raylway

FAULT = "Ray Train did not call Trainer._create_default_callbacks"


def test_status_shows_hooks_without_effect_also_if_no_cluster_is_up(home):
    hooks.report("training", [FAULT])
    shown = raylway("status")
    assert f"without effect: training: {FAULT}" in shown.stdout.splitlines()
    assert (shown.returncode, "no cluster is up" in shown.stderr) == (2, True)
    hooks.report("training", [])
    assert "without effect" not in raylway("status").stdout


def test_the_documents_of_all_endpoints_have_the_hooks_without_effect(monkeypatch):
    endpoint = SimpleNamespace(name="income", document=lambda: {"name": "income", "faults": []})
    monkeypatch.setattr(serve.status, "read_endpoints", lambda: [endpoint])
    monkeypatch.setattr(serve.monitor, "report", lambda: None)
    assert [document["hooks"] for document in serve.statuses()] == [[]]
    hooks.report("training", [FAULT])
    assert [document["hooks"] for document in serve.statuses()] == [[f"training: {FAULT}"]]
