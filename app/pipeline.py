"""The way of a model: prepare, train, evaluate, gate, register."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import bundle, capacity, judging, registry, store
from app.bundle import Bundle
from app.config import Project
from app.console import Console
from app.data import split
from app.data.prepare import Prepared, prepare
from app.evaluation import gate, metrics, report, slices
from app.export import onnx, text
from app.registry import CHAMPION, Version
from app.tasks import Task, task_of
from app.training import trainer
from app.training.trainer import Trained

CODE = (bundle, metrics, report, slices, onnx, text, sys.modules[__name__])
NUM_REFERENCE_ROWS = 10_000


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
    store.require_shared()
    project = with_key(project)
    # Ray Data's tasks take a CPU each.
    console.wait(capacity.now().wait(1, "preparing data"))
    with console.stage("prepare") as done:
        prepared = prepare(project, fresh=fresh)
        done(_described(prepared), cached=prepared.cached)
    with registry.run(project, _bundle_key(project, prepared), fresh=fresh) as run:
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
            scores = task.baselines(fresh=fresh)
            candidate = _candidate(project, task, trained, scores, fresh=fresh)
            evaluation = json.loads((candidate / "metrics.json").read_text())
            score = f"test {task.score} {evaluation['model'][task.score]:.4f}"
            done(f"{score}, ONNX within {evaluation['onnx_difference']:.0e}")
        path, decision, version = judging.register(project.name, candidate, project.gate, task, run, console)
    return Outcome(run.id, path, trained.history, evaluation, decision, version)


def with_key(project: Project) -> Project:
    """The project with the split key of its champion, if its file names none and columns were added since.

    Rows then stay in their parts, and candidate and champion are compared on the whole test part.
    """
    version = registry.find(project.name, CHAMPION)
    before = split.partition_at(version.path) if version else None
    return project.model_copy(update={"data": split.carried(project.data, before)})


def _described(prepared: Prepared) -> str:
    parts = prepared.summary["parts"]
    return ", ".join(f"{part['rows']:,} {name}" for name, part in parts.items()) + " rows"


def _trained(project: Project) -> str:
    training = project.training
    low, high = training.min_workers, training.max_workers
    backend = {"horovod": "Horovod", "ddp": "DDP"}[training.backend]
    return f"{project.model.kind}, {low if low == high else f'{low} to {high}'} {backend} workers"


def _candidate(
    project: Project, task: Task, trained: Trained, scores: Mapping[str, Any], *, fresh: bool
) -> Path:
    """Make the bundle of a trained model, with its metrics on the test part but without the gate's decision;
    returns its folder."""
    prepared = task.prepared
    target = store.folder("bundle", _bundle_key(project, prepared))

    def build(draft: Path) -> None:
        from safetensors.torch import load_file

        network = task.network()
        network.load_state_dict(load_file(trained.weights))
        difference = task.export(network, draft)
        schema = task.schema()
        shutil.copy(trained.weights, draft / "model.safetensors")
        (draft / "schema.json").write_text(schema.model_dump_json(indent=1))
        (draft / "project.json").write_text(project.model_dump_json(indent=1))
        for name in (split.PARTITION, split.SEEN):
            if (prepared.path / name).exists():
                shutil.copy(prepared.path / name, draft)
        train, test = prepared.frame("train"), prepared.frame("test")
        train.sample(min(len(train), NUM_REFERENCE_ROWS), random_state=project.seed).to_parquet(
            draft / "reference.parquet", index=False
        )
        opened = Bundle(draft, sealed=False)
        bundle.write_example(opened, test)
        evaluation = {**task.evaluate(opened), "baselines": scores, "onnx_difference": difference}
        (draft / "metrics.json").write_text(json.dumps(evaluation, indent=1))
        (draft / "card.md").write_text(report.card(project, prepared.summary, evaluation))
        registry.write_flavor(draft)
        facts = {"data_version": prepared.summary["data_version"], "prepared": prepared.key}
        bundle.seal(draft, {**facts, "seed": project.seed})

    store.produce(target, build, fresh=fresh)
    return store.current(target)


def _bundle_key(project: Project, prepared: Prepared) -> str:
    trained = trainer.key(project, prepared)
    told = {"name", "data", "features", "evaluation", "compression", "gate"}
    inputs = {"trained": trained, **project.model_dump(mode="json", include=told)}
    return store.key("bundle", inputs, CODE)
