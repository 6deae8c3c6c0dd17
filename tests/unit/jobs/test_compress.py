import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from app.bundle.manifest import seal
from app.errors import UserError
from app.jobs import compress
from app.jobs.quantization import CompressedBundle
from tests.bundles import PASSED, PROJECT, build


@pytest.fixture
def registrations(monkeypatch):
    """Arguments of `judging.register`, which is not called."""
    calls = []
    run = SimpleNamespace(log_results=lambda metrics, tags: calls.append(tags))

    @contextmanager
    def started(project, key):
        yield run

    monkeypatch.setattr(compress.runs, "run", started)
    monkeypatch.setattr(compress, "task_of", lambda *_: None)
    monkeypatch.setattr(compress.quantization, "prepared_of", lambda *_: None)
    monkeypatch.setattr(compress.judging, "register", lambda *arguments: calls.append(arguments))
    return calls


def compressed(tmp_path, decision) -> CompressedBundle:
    path = build(tmp_path / "b", seed=0)
    project = {**PROJECT, "gate": {"tolerance": 0.02}, "compression": {"max_loss": 0.01}}
    (path / "project.json").write_text(json.dumps(project))
    seal(path, {"compressed_from": {"identity": "original", "decision": decision}})
    return CompressedBundle(path, {})


def test_the_int8_bundle_may_lose_the_tolerance_and_the_maximum_loss(tmp_path, registrations):
    compress.register(compressed(tmp_path, PASSED), None)
    tags, (name, path, rules, *_) = registrations
    assert tags == {"raylway.compressed_from": "original"}
    assert (name, path) == ("income", tmp_path / "b")
    assert rules.tolerance == pytest.approx(0.03)


def test_the_int8_bundle_of_a_rejected_original_is_refused(tmp_path, registrations):
    with pytest.raises(UserError, match="that it was compressed from must have passed the gate"):
        compress.register(compressed(tmp_path, {**PASSED, "passed": False}), None)
    assert registrations == []
