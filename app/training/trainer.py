"""The training stage: from a project and its prepared data to a trained network."""

import json
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.config import Project
from app.data.prepare import Prepared
from app.errors import Interrupted, UserError
from app.state import files, stages
from app.state.home import home
from app.tasks import module_of
from app.training import checkpoint, collective, loop, preflight
from app.training.checkpoint import Checkpoints
from app.training.observer import Ending, InProcess, Outcome
from app.training.workers.fit import fit
from app.training.workers.rank import Wrap, assigned_device

SETTINGS_WITHOUT_EFFECT = {
    "max_failures",
    "hang_timeout_s",
    "checkpoints",
    "timeline",
    "num_cpus",
    "num_gpus",
}
"""Settings of `training` that do not change the trained network, and so are not in the stage's key."""


@dataclass(frozen=True)
class Trained:
    """The output of the stage: a folder with the network's parameters and the history."""

    path: Path
    key: str
    cached: bool
    """Whether an earlier call had trained it."""

    @property
    def history(self) -> list[dict[str, float]]:
        """Metrics of each epoch, in order."""
        return json.loads((self.path / "history.json").read_text())

    @property
    def weights(self) -> Path:
        """Parameters of the epoch with the best validation score (safetensors)."""
        return self.path / "model.safetensors"


def key(project: Project, prepared: Prepared, lineage: str = "") -> str:
    """The stage's key: the same for a training and for the run that resumes it after an interruption.

    `lineage` distinguishes trainings that start from a checkpoint of another one; empty for all others.
    """
    inputs = project.model_dump(mode="json", include={"model", "training", "seed"})
    inputs["training"] = {k: v for k, v in inputs["training"].items() if k not in SETTINGS_WITHOUT_EFFECT}
    if lineage:
        inputs["lineage"] = lineage
    return stages.key("train", {**inputs, "prepared": prepared.key}, __name__, module_of(project, "task"))


def checkpoints_of(key: str) -> Path:
    """Folder of the checkpoints of an unfinished training."""
    return _run(key) / "checkpoints"


def _run(key: str) -> Path:
    return home() / "runs" / key


def train(
    project: Project,
    prepared: Prepared,
    on_epoch: Callable[[dict[str, float]], None],
    on_note: Callable[[str], None] = print,
    *,
    fresh: bool = False,
    lineage: str = "",
    stop: threading.Event | None = None,
    in_process: bool = False,
    wrap: Wrap = lambda observer: observer,
) -> Trained:
    """Train, unless an earlier call has; an interrupted training resumes from its last checkpoint.

    `on_epoch` receives the metrics of each epoch as it ends, `on_note` lines for the user. `fresh` trains
    from the start, even if there is a result or a checkpoint. `stop`, once set, ends the training as a signal
    would. `in_process` trains the project's only worker in this thread, without Ray Train. `wrap` is applied
    to the observer of each rank, in the rank's process. Needs Ray.

    Raises UserError if this machine cannot train the project, if there are fewer rows than workers, or if the
    loss diverges; Interrupted on SIGTERM or SIGINT, after a checkpoint is written;
    `ray.train.TrainingFailedError` once `max_failures` is spent.
    """
    name = key(project, prepared, lineage)
    target = stages.folder("train", name)
    run = _run(name)
    stop = stop or threading.Event()
    if fresh:
        files.discard(run)

    signals: list[int] = []

    def build(draft: Path) -> None:
        preflight.require(project.training)
        if in_process:
            ending = _fit_in_process(project, prepared, run, InProcess(on_epoch, on_note, stop), wrap)
        else:
            ending, received = fit(project, prepared, run, on_epoch, on_note, stop, wrap)
            signals.extend(received)
        _require_finished(ending, project.training.learning_rate, signals)
        checkpoints = Checkpoints(checkpoints_of(name), project.training.checkpoints)
        last = checkpoints.latest(on_note)
        assert last is not None, "a finished training has a checkpoint of its last epoch"
        shutil.copy(checkpoints.best(on_note) / "model.safetensors", draft)
        (draft / "history.json").write_text(json.dumps(checkpoint.read_state(last)["history"], indent=1))
        if (timeline := run / "timeline.json").exists():
            shutil.copy(timeline, draft)

    built = stages.produce(target, build, fresh=fresh)
    files.discard(run)  # the checkpoints are no longer needed
    if signals:
        raise Interrupted("the training had already finished, and its result is kept", signals[0])
    return Trained(stages.current(target), name, cached=not built)


def _fit_in_process(
    project: Project, prepared: Prepared, run: Path, observer: InProcess, wrap: Wrap
) -> Ending:
    """Train to the end as the only rank, in this thread."""
    ranks = collective.join(project.training, run / "timeline.json")
    loop.train(project, prepared, run, ranks, wrap(observer), assigned_device(in_group=False))
    ranks.close()
    assert observer.ending is not None, "a loop that returns has reported how it ended"
    return observer.ending


def _require_finished(ending: Ending, learning_rate: float, signals: list[int]) -> None:
    """Raise Interrupted or UserError unless the training is finished."""
    if ending.outcome in (Outcome.STOPPED, Outcome.MOVED):
        place = f"epoch {ending.epoch + 1}" + (f", step {ending.step}" if ending.step else "")
        raise Interrupted(f"a checkpoint of {place} is kept", signals[0] if signals else signal.SIGTERM)
    if ending.outcome is Outcome.DIVERGED:
        raise UserError(
            f"the training diverged in epoch {ending.epoch + 1}: its loss is no longer finite; lower "
            f"training.learning_rate (it is {learning_rate:g})"
        )
