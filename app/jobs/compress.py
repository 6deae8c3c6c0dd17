"""Registering the int8 version of a bundle."""

from app.bundle.manifest import require_passed, verify
from app.config import Project
from app.console import Console
from app.jobs import judging, quantization
from app.jobs.judging import JudgedBundle
from app.jobs.quantization import CompressedBundle
from app.registry import runs
from app.tasks import task_of


def register(compressed: CompressedBundle, console: Console) -> JudgedBundle:
    """Let the gate judge an int8 bundle, and register it if it passes, with an MLflow run of its own.

    Its metric may be below the champion's, which may be its original, by `gate.tolerance` plus
    `compression.max_loss`. Raises UserError if the original has not passed the gate.
    """
    project = Project.model_validate_json((compressed.path / "project.json").read_text())
    manifest = verify(compressed.path)
    require_passed(manifest["compressed_from"], "the bundle that it was compressed from")
    tolerance = project.gate.tolerance + project.compression.max_loss
    rules = project.gate.model_copy(update={"tolerance": tolerance})
    task = task_of(project, quantization.prepared_of(manifest, compressed.path))
    with runs.run(project, compressed.path.name) as run:
        run.log_results({}, {"raylway.compressed_from": manifest["compressed_from"]["identity"]})
        return judging.register(project.name, compressed.path, rules, task, run, console)
