"""From a candidate to a registered version: the gate's decision becomes part of its bundle."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def register(
    name: str, candidate: Path, rules: Gate, task: Task, run: Run, console: Console
) -> tuple[Path, gate.Decision, Version | None]:
    """Judge a candidate, store its bundle with the run, and register it if it passes.

    Returns the bundle's folder, the decision, and the version if there is one. A candidate that has a version
    keeps it, and the decision of that time.
    """
    done = None
    while done is None:
        done = _once(name, candidate, rules, task, run, console)
    return done


def _once(
    name: str, candidate: Path, rules: Gate, task: Task, run: Run, console: Console
) -> tuple[Path, gate.Decision, Version | None] | None:
    """None if another became the champion meanwhile."""
    metrics = json.loads((candidate / "metrics.json").read_text())
    with console.stage("gate") as done:
        known = registration.registered_candidate(name, identity_of(candidate))
        path = known.path if known else _judged(name, candidate, rules, metrics, task)
        decision = decision_of(path)
        verdict = f"{'passed' if decision.passed else 'not passed'}: {decision.reason}"
        done(verdict, cached=known is not None)
    with console.stage("register") as done:
        if not (known and run.resumed):
            results = {f"test_{metric}": value for metric, value in metrics["model"].items()}
            run.log_results(results, {"raylway.gate": verdict})
        uri = run.log_bundle(path)
        if not decision.passed:
            done("not registered; the run and its bundle are in MLflow")
            return path, decision, None
        try:
            version = registration.register(name, run.id, path, uri)
        except registration.Outdated as outdated:
            done(f"{outdated}; judging again")
            return None
        done(f"{name} version {version.number} ({', '.join(version.aliases) or 'no alias'})")
        return path, decision, version


def decision_of(path: Path) -> gate.Decision:
    """What the gate decided about the bundle in a folder."""
    sealed = manifest_of(path)["decision"]
    return gate.Decision(sealed["passed"], sealed["reason"])


def _judged(name: str, candidate: Path, rules: Gate, metrics: Mapping[str, Any], task: Task) -> Path:
    """The folder of the candidate's bundle with the decision in it: in its manifest and on its card."""
    version = versions.find(name, CHAMPION)
    beside = _beside(candidate, version, task)
    decision = gate.decide(rules, metrics["model"], metrics["baselines"], beside)
    against = version and {
        "version": version.number,
        "identity": version.identity,
        "comparison": beside and asdict(beside),
    }
    facts = {**asdict(decision), "gate": rules.model_dump(mode="json"), "champion": against}
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch)
        manifest.copy(candidate, draft)
        file = draft / "card.md"
        file.write_text(f"{file.read_text()}\n{card.gate_section(decision.passed, decision.reason)}")
        known = {k: v for k, v in manifest_of(candidate).items() if k != "files"}
        seal(draft, {**known, "candidate": identity_of(candidate), "decision": facts})
        return copies.keep(draft)


def _beside(candidate: Path, version: Version | None, task: Task) -> Comparison | NotComparable | None:
    """The candidate's bundle beside the champion's; None if no version is registered."""
    if version is None:
        return None
    opened = Bundle(candidate), Bundle(version.path)
    packager = packager_of(task)
    return compare(task.prepared, *opened, lambda one, rows: packager.evaluate(one, rows)["model"])
