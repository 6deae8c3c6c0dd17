"""Judging a candidate: the gate's decision becomes part of its bundle, which is registered if it passed."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from app.bundle import copies, manifest
from app.bundle.bundle import Bundle
from app.bundle.manifest import identity_of, manifest_of, seal
from app.config import Gate
from app.console import Console
from app.evaluation import card, gate
from app.evaluation.comparison import Comparison, NotComparable, compare
from app.registry import registration, versions
from app.registry.runs import Run
from app.registry.versions import CHAMPION, Version
from app.tasks import Task, packager_of


class JudgedBundle(NamedTuple):
    """A bundle with the gate's decision."""

    path: Path
    """Folder of the bundle."""
    decision: gate.Decision
    version: Version | None
    """Registered version; None if the bundle did not pass."""


def register(name: str, candidate: Path, rules: Gate, task: Task, run: Run, console: Console) -> JudgedBundle:
    """Judge a candidate, store its bundle with the run, and register it if it passes.

    A candidate that is registered already keeps its version and its decision.
    """
    judged = None
    while judged is None:
        judged = _try_register(name, candidate, rules, task, run, console)
    return judged


def _try_register(
    name: str, candidate: Path, rules: Gate, task: Task, run: Run, console: Console
) -> JudgedBundle | None:
    """Like `register`, but returns None if the champion changed after the decision: then repeat it."""
    metrics = json.loads((candidate / "metrics.json").read_text())
    with console.stage("gate") as done:
        registered = registration.registered_candidate(name, identity_of(candidate))
        path = registered.path if registered else _judge(name, candidate, rules, metrics, task)
        decision = _decision_of(path)
        verdict = f"{'passed' if decision.passed else 'not passed'}: {decision.reason}"
        done(verdict, cached=registered is not None)
    with console.stage("register") as done:
        if not (registered and run.resumed):
            results = {f"test_{metric}": value for metric, value in metrics["model"].items()}
            run.log_results(results, {"raylway.gate": verdict})
        uri = run.log_bundle(path)
        if not decision.passed:
            done("not registered; the run and its bundle are in MLflow")
            return JudgedBundle(path, decision, None)
        try:
            version = registration.register(name, run.id, path, uri)
        except registration.Outdated as outdated:
            done(f"{outdated}; judging again")
            return None
        done(f"{name} version {version.number} ({', '.join(version.aliases) or 'no alias'})")
        return JudgedBundle(path, decision, version)


def _decision_of(path: Path) -> gate.Decision:
    decision = manifest_of(path)["decision"]
    return gate.Decision(decision["passed"], decision["reason"])


def _judge(name: str, candidate: Path, rules: Gate, metrics: Mapping[str, Any], task: Task) -> Path:
    """Decide on a candidate, and return the folder of its bundle with the decision in manifest and card."""
    champion = versions.find(name, CHAMPION)
    comparison = _compare(candidate, champion, task)
    decision = gate.decide(rules, metrics["model"], metrics["baselines"], comparison)
    champion_facts = champion and {
        "version": champion.number,
        "identity": champion.identity,
        "comparison": comparison and asdict(comparison),
    }
    facts = {**asdict(decision), "gate": rules.model_dump(mode="json"), "champion": champion_facts}
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch)
        manifest.copy(candidate, draft)
        file = draft / "card.md"
        file.write_text(f"{file.read_text()}\n{card.gate_section(decision.passed, decision.reason)}")
        kept = {name: value for name, value in manifest_of(candidate).items() if name != "files"}
        seal(draft, {**kept, "candidate": identity_of(candidate), "decision": facts})
        return copies.keep(draft)


def _compare(candidate: Path, champion: Version | None, task: Task) -> Comparison | NotComparable | None:
    """The comparison of the candidate with the champion; None if there is no champion."""
    if champion is None:
        return None
    packager = packager_of(task)

    def evaluate(bundle: Bundle, rows: Any) -> Mapping[str, float]:
        return packager.evaluate(bundle, rows)["model"]

    return compare(task.prepared, Bundle(candidate), Bundle(champion.path), evaluate)
