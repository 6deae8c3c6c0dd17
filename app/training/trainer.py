"""The second stage: a prepared project to a trained model, by Ray Train."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import BackendConfig

from app.cluster import capacity
from app.config import Project
from app.data.prepare import Prepared
from app.errors import Interrupted, UserError
from app.state import files, stages
from app.state.home import home
from app.tasks import module_of
from app.training import checkpoint, loop, preflight
from app.training.checkpoint import Checkpoints
from app.training.workers import horovod, progress
from app.training.workers.elastic import ElasticTrainer, Transitions
from app.training.workers.progress import Listener

NOT_OF_THE_RESULT = {"max_failures", "hang_timeout_s", "checkpoints", "timeline", "num_cpus", "num_gpus"}
"""Settings of a training that change nothing of the model that comes out."""


@dataclass(frozen=True)
class Trained:
    """The output of the stage."""

    path: Path
    key: str
    cached: bool

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of every epoch, in order."""
        return json.loads((self.path / "history.json").read_text())

    @property
    def weights(self) -> Path:
        """The parameters (safetensors) of the epoch with the best validation score."""
        return self.path / "model.safetensors"


def key(project: Project, prepared: Prepared, lineage: str = "") -> str:
    """The name of this training: the same for a run that goes on after an interruption.

    `lineage` tells one that began with another's parameters from one that began with its own.
    """
    inputs = project.model_dump(mode="json", include={"model", "training", "seed"})
    inputs["training"] = {k: v for k, v in inputs["training"].items() if k not in NOT_OF_THE_RESULT}
    if lineage:
        inputs["lineage"] = lineage
    return stages.key("train", {**inputs, "prepared": prepared.key}, __name__, module_of(project, "task"))


def checkpoints_of(key: str) -> Path:
    """Where a training with this key that is not done yet has its checkpoints."""
    return _run(key) / "checkpoints"


def _run(key: str) -> Path:
    return home() / "runs" / key


def done(project: Project, prepared: Prepared) -> bool:
    """Whether this training has been done before."""
    return stages.folder("train", key(project, prepared)).exists()


def train(
    project: Project,
    prepared: Prepared,
    on_epoch: Callable[[dict[str, float]], None],
    on_note: Callable[[str], None] = print,
    *,
    fresh: bool = False,
    lineage: str = "",
    stop: threading.Event | None = None,
    here: bool = False,
) -> Trained:
    """Train, unless it has been done; an interrupted training goes on from its last checkpoint.

    `on_epoch` hears the metrics of each epoch as it ends, `on_note` lines for a person. `stop`, once set,
    ends it as a signal would. `here` trains the one worker that the project asks for in this process, with no
    Ray Train around it. Needs Ray. Raises UserError if this cannot run here, there are fewer rows than
    workers, or the loss diverges; Interrupted on SIGTERM or Ctrl-C, once a checkpoint is written;
    `ray.train.TrainingFailedError` once `max_failures` is spent.
    """
    name = key(project, prepared, lineage)
    target = stages.folder("train", name)
    run = _run(name)
    stop = stop or threading.Event()
    if fresh:
        files.discard(run)

    caught: list[int] = []

    def build(draft: Path) -> None:
        preflight.require(project.training)
        fit = _fit_here if here else _fit
        caught.extend(fit(project, prepared, run, on_epoch, on_note, stop))
        checkpoints = Checkpoints(checkpoints_of(name), project.training.checkpoints)
        last = checkpoints.latest(on_note)
        assert last is not None, "a finished training has a checkpoint of its last epoch"
        _, state = checkpoint.read(last)
        shutil.copy(checkpoints.best(on_note) / "model.safetensors", draft)
        (draft / "history.json").write_text(json.dumps(state["history"], indent=1))
        if (timeline := run / "timeline.json").exists():
            shutil.copy(timeline, draft)

    built = stages.produce(target, build, fresh=fresh)
    files.discard(run)  # its checkpoints have served
    if caught:
        raise Interrupted("the training was at its end and is kept", caught[0])
    return Trained(stages.current(target), name, cached=not built)


def _fit(
    project: Project,
    prepared: Prepared,
    run: Path,
    on_epoch: Callable[[dict[str, float]], None],
    on_note: Callable[[str], None],
    stop: threading.Event,
) -> list[int]:
    """Train to the end. A group whose node goes away is followed by another, elsewhere.

    Returns the signals that came too late to stop it.
    """
    training = project.training
    parts = prepared.summary["parts"]
    if min(parts["train"]["rows"], parts["validation"]["rows"]) < training.max_workers:
        raise UserError(
            f"training.num_workers: {training.max_workers} workers, but fewer rows than that to share out"
        )
    outcome = ""
    caught: list[int] = []
    while outcome in ("", "moved") and not caught:
        if outcome:
            on_note("a node is going away: a checkpoint is written, the training moves on elsewhere")
        with progress.listening(on_epoch, on_note) as listener:
            caught = _fit_once(project, prepared, run, listener, on_note, stop)
            end = listener.end()
            outcome = end["outcome"]
    _refuse(end, training.learning_rate, caught)
    return caught


def _fit_here(
    project: Project,
    prepared: Prepared,
    run: Path,
    on_epoch: Callable[[dict[str, float]], None],
    on_note: Callable[[str], None],
    stop: threading.Event,
) -> list[int]:
    """Train to the end as the only rank, in this process and thread."""
    teller = progress.Here(on_epoch, on_note, stop)
    settings = {"project": project.model_dump_json(), "prepared": str(prepared.path), "run": str(run)}
    loop.train(settings, teller)
    _refuse(teller.ended, project.training.learning_rate, [])
    return []


def _refuse(end: dict[str, Any], learning_rate: float, caught: list[int]) -> None:
    """Raise Interrupted or UserError for a training that is not finished."""
    if end["outcome"] in ("stopped", "moved"):
        place = f"epoch {end['epoch'] + 1}" + (f", step {end['step']}" if end["step"] else "")
        raise Interrupted(f"a checkpoint of {place} is kept", caught[0] if caught else signal.SIGTERM)
    if end["outcome"] == "diverged":
        raise UserError(
            f"the training diverged in epoch {end['epoch'] + 1}: its loss is no longer finite; lower "
            f"training.learning_rate (it is {learning_rate:g})"
        )


def _fit_once(
    project: Project,
    prepared: Prepared,
    run: Path,
    listener: Listener,
    on_note: Callable[[str], None],
    stop: threading.Event,
) -> list[int]:
    """One `fit`; returns the signals that were caught meanwhile and passed on to the ranks.

    Raises Interrupted if a signal comes while there are no ranks: then there is nothing to wait for.
    """
    training = project.training
    claimed, note = resources(project, training.min_workers)
    trainer = ElasticTrainer(
        loop.train_loop,
        train_loop_config={
            "project": project.model_dump_json(),
            "prepared": str(prepared.path),
            "run": str(run),
            "progress": listener.actor,
        },
        backend_config=_backend(project),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=use_gpu(project),
            resources_per_worker=claimed,
            elastic_resize_monitor_interval_s=10,
        ),
        run_config=ray.train.RunConfig(
            # Ray's own snapshots of a run are not needed: ours are whole whenever the process is killed.
            name=f"{run.name}-{time.time_ns()}",
            storage_path=str(run / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            callbacks=[Transitions(listener.actor)],
        ),
    )
    # In a thread of its own: in the main one, Ray takes SIGINT for itself and aborts the ranks. Nobody waits
    # for it at the end: after a second signal it may have no end.
    future: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    with passing_signals_on(listener.stop) as caught:
        if note:
            on_note(note)
        threading.Thread(target=fit, name="fit", daemon=True).start()
        said = False
        while not future.done():
            wait_for([future], timeout=0.2)
            if (caught or stop.is_set()) and listener.waits():
                number = caught[0] if caught else signal.SIGTERM
                raise Interrupted("it waited for room on the cluster, and trained nothing meanwhile", number)
            if caught and not said:
                on_note("stopping after a checkpoint; the same again stops at once")
                said = True
            if stop.is_set():
                listener.stop()
                stop = threading.Event()  # once is enough
    future.result()
    return caught


@contextmanager
def passing_signals_on(stop: Callable[[], None]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM call `stop`, for an end in order; a second one is obeyed at once.

    Yields the signals that have come.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        if len(caught) == 1:
            stop()
            return
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _backend(project: Project) -> Any:
    if project.training.max_workers == 1 and not project.training.timeline:
        return BackendConfig()  # nobody to talk to
    if project.training.backend == "ddp":
        from app.training.workers.ddp import DdpConfig

        return DdpConfig(backend="nccl" if use_gpu(project) else "gloo")
    return horovod.HorovodConfig()


def resources(project: Project, num_workers: int) -> tuple[dict[str, float], str | None]:
    """What each of so many workers claims of the cluster, and what to tell the user about it.

    Raises UserError if the cluster can never have room for them.
    """
    training = project.training
    setting = "training.num_workers x training.num_cpus"
    num_cpus, note = capacity.current().cpus_per_worker(training.num_cpus, num_workers, setting)
    return {"CPU": num_cpus} | ({"GPU": training.num_gpus} if use_gpu(project) else {}), note


def use_gpu(project: Project) -> bool:
    """Whether the workers train on GPUs. Raises UserError if they must, and the cluster has none."""
    training = project.training
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if training.device == "cuda" and not num_gpus:
        raise UserError("training.device: cuda, but the cluster has no GPU; say auto or cpu")
    return training.device != "cpu" and num_gpus >= training.max_workers * training.num_gpus
