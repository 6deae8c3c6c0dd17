"""The way of a model: prepare, train, evaluate, gate, register."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.cluster import capacity
from app.config import Project
from app.console import Console
from app.data.partition import read_partition, with_partition_key
from app.data.prepare import Prepared, prepare
from app.evaluation import gate
from app.jobs import candidate, judging
from app.registry import runs, versions
from app.registry.versions import CHAMPION, Version
from app.state import shared
from app.tasks import task_of
from app.training import trainer


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    run_id: str
    bundle: Path
    """Its folder."""
    history: list[dict[str, float]]
    evaluation: dict[str, Any]
    """The bundle's metrics.json: `model`, `baselines`, `reliability`, `onnx_difference`."""
    decision: gate.Decision
    version: Version | None
    """None if the gate did not let the candidate pass."""


def run(project: Project, console: Console, *, fresh: bool = False) -> Outcome:
    """Take a project from its raw data to a registered version. Needs Ray.

    What was done before is not done again, unless `fresh`; an interrupted run goes on where it was.
    """
    shared.require_shared()
    project = with_key(project)
    # Ray Data's tasks take a CPU each.
    console.wait(capacity.current().wait_message(1, "preparing data"))
    with console.stage("prepare") as done:
        prepared = prepare(project, fresh=fresh)
        done(_described(prepared), cached=prepared.cached)
    with runs.run(project, candidate.key(project, prepared), fresh=fresh) as run:
        task = task_of(project, prepared)

        def on_epoch(epoch: dict[str, float]) -> None:
            console.epoch(epoch, project.training.epochs, task.score)
            run.log_epoch(epoch)

        def on_note(note: str) -> None:
            console.say(f"  {note}", style="yellow")

        with console.stage("train") as done:
            trained = trainer.train(project, prepared, on_epoch, on_note, fresh=fresh)
            for epoch in trained.history:
                run.log_epoch(epoch)
            done(
                f"{_trained(project)}{', continued' if run.resumed else ''}",
                cached=trained.cached,
            )
        with console.stage("evaluate") as done:
            scores = candidate.baselines(task, fresh=fresh)
            folder = candidate.build(project, task, trained, scores, fresh=fresh)
            evaluation = json.loads((folder / "metrics.json").read_text())
            score = f"test {task.score} {evaluation['model'][task.score]:.4f}"
            done(f"{score}, ONNX within {evaluation['onnx_difference']:.0e}")
        path, decision, version = judging.register(project.name, folder, project.gate, task, run, console)
    return Outcome(run.id, path, trained.history, evaluation, decision, version)


def with_key(project: Project) -> Project:
    """The project with the split key of its champion, if its file names none and columns were added since.

    Rows then stay in their parts, and candidate and champion are compared on the whole test part.
    """
    version = versions.find(project.name, CHAMPION)
    before = read_partition(version.path) if version else None
    return project.model_copy(update={"data": with_partition_key(project.data, before)})


def _described(prepared: Prepared) -> str:
    parts = prepared.summary["parts"]
    return ", ".join(f"{part['rows']:,} {name}" for name, part in parts.items()) + " rows"


def _trained(project: Project) -> str:
    training = project.training
    low, high = training.min_workers, training.max_workers
    backend = {"horovod": "Horovod", "ddp": "DDP"}[training.backend]
    return f"{project.model.kind}, {low if low == high else f'{low} to {high}'} {backend} workers"
