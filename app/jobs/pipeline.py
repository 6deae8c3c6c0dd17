"""The pipeline of a model: prepare, train, evaluate, gate, register."""

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

BACKENDS = {"horovod": "Horovod", "ddp": "DDP"}
"""Names of the training backends in output."""


@dataclass(frozen=True)
class Outcome:
    """Result of a pipeline run."""

    run_id: str
    bundle: Path
    """Folder of the bundle."""
    history: list[dict[str, float]]
    """Metrics of each epoch."""
    evaluation: dict[str, Any]
    """Content of the bundle's metrics.json: `model`, `baselines`, `reliability`, `onnx_difference`."""
    decision: gate.Decision
    version: Version | None
    """Registered version; None if the candidate did not pass the gate."""


def run(project: Project, console: Console, *, fresh: bool = False) -> Outcome:
    """Take a project from its source to a registered version. Needs Ray.

    Finished stages are not repeated, unless `fresh`; an interrupted run is resumed.
    """
    shared.require_shared()
    project = with_champion_key(project)
    # Each task of Ray Data takes a CPU.
    console.print_wait(capacity.current().wait_message(1, "preparing data"))
    with console.stage("prepare") as done:
        prepared = prepare(project, fresh=fresh)
        done(_describe_parts(prepared), cached=prepared.cached)
    with runs.run(project, candidate.key(project, prepared), fresh=fresh) as run:
        task = task_of(project, prepared)

        def on_epoch(epoch: dict[str, float]) -> None:
            console.epoch(epoch, project.training.epochs, task.score)
            run.log_epoch(epoch)

        def on_note(note: str) -> None:
            console.print(f"  {note}", style="yellow")

        with console.stage("train") as done:
            trained = trainer.train(project, prepared, on_epoch, on_note, fresh=fresh)
            for epoch in trained.history:
                run.log_epoch(epoch)
            resumed = ", resumed" if run.resumed else ""
            done(f"{_describe_training(project)}{resumed}", cached=trained.cached)
        with console.stage("evaluate") as done:
            scores = candidate.baselines(task, fresh=fresh)
            folder = candidate.build(project, task, trained, scores, fresh=fresh)
            evaluation = json.loads((folder / "metrics.json").read_text())
            score = f"test {task.score} {evaluation['model'][task.score]:.4f}"
            done(f"{score}, ONNX within {evaluation['onnx_difference']:.0e}")
        path, decision, version = judging.register(project.name, folder, project.gate, task, run, console)
    return Outcome(run.id, path, trained.history, evaluation, decision, version)


def with_champion_key(project: Project) -> Project:
    """The project with the split key of its champion, if columns were added since and it sets no key itself.

    Rows then stay in their parts, so that candidate and champion are compared on the whole test part.
    """
    champion = versions.find(project.name, CHAMPION)
    partition = read_partition(champion.path) if champion else None
    return project.model_copy(update={"data": with_partition_key(project.data, partition)})


def _describe_parts(prepared: Prepared) -> str:
    parts = prepared.summary["parts"]
    return ", ".join(f"{part['rows']:,} {name}" for name, part in parts.items()) + " rows"


def _describe_training(project: Project) -> str:
    training = project.training
    low, high = training.min_workers, training.max_workers
    num_workers = str(low) if low == high else f"{low} to {high}"
    return f"{project.model.kind}, {num_workers} {BACKENDS[training.backend]} workers"
