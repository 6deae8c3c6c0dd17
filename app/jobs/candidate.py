"""The stage after training, which makes a candidate from a trained network.

A candidate is a bundle with its metrics on the test part, but without the gate's decision.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.bundle import bundle
from app.bundle.bundle import Bundle
from app.bundle.manifest import seal
from app.config import Project
from app.data.partition import PARTITION_FILE, SEEN_FILE
from app.data.prepare import Prepared
from app.evaluation import card
from app.registry import flavor
from app.state import stages
from app.tasks import Task, baselines_of, module_of, packager_of
from app.training import trainer
from app.training.trainer import Trained

MAX_REFERENCE_ROWS = 10_000
"""Maximum number of training rows in a bundle's reference sample."""
KEY_SECTIONS = {"name", "data", "features", "evaluation", "compression", "gate"}
"""Keys of the project on which a bundle depends, in addition to those on which its network does."""


def build(
    project: Project, task: Task, trained: Trained, scores: Mapping[str, Any], *, fresh: bool = False
) -> Path:
    """Make the bundle of a trained network, unless it exists, and return its folder.

    `scores` are the baselines' metrics.
    """
    prepared = task.prepared
    target = stages.folder("bundle", key(project, prepared))

    def write(draft: Path) -> None:
        from safetensors.torch import load_file

        packager = packager_of(task)
        network = task.network()
        network.load_state_dict(load_file(trained.weights))
        difference = packager.export(network, draft)
        schema = packager.schema()
        shutil.copy(trained.weights, draft / "model.safetensors")
        (draft / "schema.json").write_text(schema.model_dump_json(indent=1))
        (draft / "project.json").write_text(project.model_dump_json(indent=1))
        for name in (PARTITION_FILE, SEEN_FILE):
            if (prepared.path / name).exists():
                shutil.copy(prepared.path / name, draft)
        train, test = prepared.frame("train"), prepared.frame("test")
        reference = train.sample(min(len(train), MAX_REFERENCE_ROWS), random_state=project.seed)
        reference.to_parquet(draft / "reference.parquet", index=False)
        candidate = Bundle(draft, sealed=False)
        bundle.write_example(candidate, test)
        evaluation = {**packager.evaluate(candidate), "baselines": scores, "onnx_difference": difference}
        (draft / "metrics.json").write_text(json.dumps(evaluation, indent=1))
        (draft / "card.md").write_text(card.render(project, prepared.summary, evaluation))
        flavor.write(draft)
        facts = {"data_version": prepared.summary["data_version"], "prepared": prepared.key}
        seal(draft, {**facts, "seed": project.seed})

    stages.produce(target, write, fresh=fresh)
    return stages.current(target)


def baselines(task: Task, *, fresh: bool = False) -> dict[str, dict[str, float]]:
    """The metrics of the baselines on the test part, computed once for each prepared data set."""
    target = stages.folder("baselines", baselines_key(task.project, task.prepared))

    def write(draft: Path) -> None:
        (draft / "metrics.json").write_text(json.dumps(baselines_of(task), indent=1))

    stages.produce(target, write, fresh=fresh)
    return json.loads((target / "metrics.json").read_text())


def baselines_key(project: Project, prepared: Prepared) -> str:
    """The stage key of a project's baselines."""
    inputs = {"prepared": prepared.key, "seed": project.seed}
    return stages.key("baselines", inputs, module_of(project, "baselines"))


def key(project: Project, prepared: Prepared) -> str:
    """The stage key of a project's bundle."""
    inputs = {
        "trained": trainer.key(project, prepared),
        **project.model_dump(mode="json", include=KEY_SECTIONS),
    }
    return stages.key("bundle", inputs, __name__, module_of(project, "packager"))
