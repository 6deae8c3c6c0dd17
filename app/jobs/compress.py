"""Compressing a registered bundle: its int8 version, and its registration."""

from pathlib import Path

from app.bundle.manifest import require_passed, verify
from app.config import Project
from app.console import Console
from app.evaluation import gate
from app.jobs import judging, quantization
from app.jobs.quantization import Compressed
from app.registry import runs
from app.registry.versions import Version
from app.tasks import task_of


def register(made: Compressed, console: Console) -> tuple[Path, gate.Decision, Version | None]:
    """Have the gate judge the int8 bundle and register it, in a run of its own; returns its folder, the
    decision, and the version if it passed.

    Its original must have passed the gate: raises UserError if not. Beside `gate.tolerance` it may lose
    `compression.max_loss` against the champion, which may be its original.
    """
    project = Project.model_validate_json((made.path / "project.json").read_text())
    manifest = verify(made.path)
    require_passed(manifest["compressed_from"], "the bundle that it was made of")
    tolerance = project.gate.tolerance + project.compression.max_loss
    rules = project.gate.model_copy(update={"tolerance": tolerance})
    task = task_of(project, quantization.prepared_of(manifest, made.path))
    with runs.run(project, made.path.name) as run:
        run.log_results({}, {"raylway.compressed_from": manifest["compressed_from"]["identity"]})
        return judging.register(project.name, made.path, rules, task, run, console)
