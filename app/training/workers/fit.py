"""Training on workers of Ray Train, from a start or a resume to the end."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path

import ray
import ray.train
from ray.train.backend import BackendConfig

from app.cluster import capacity
from app.config import Project
from app.data.prepare import Prepared
from app.errors import Interrupted, UserError
from app.training.observer import Ending, Outcome
from app.training.signals import stopping_on_signal
from app.training.workers import horovod, overrides, progress
from app.training.workers.elastic import ElasticTrainer, Transitions
from app.training.workers.progress import Listener
from app.training.workers.rank import Wrap, train_on_worker

RESIZE_INTERVAL_S = 10
"""How often an elastic group checks whether the cluster has room for more workers."""


def fit(
    project: Project,
    prepared: Prepared,
    run: Path,
    on_epoch: Callable[[dict[str, float]], None],
    on_note: Callable[[str], None],
    stop: threading.Event,
    wrap: Wrap,
) -> tuple[Ending, list[int]]:
    """Train until the training is finished, stopped or diverged.

    When a node is about to be taken away, the ranks write a checkpoint and end, and new ones continue on
    other nodes. Returns how the ranks ended, and the signals received meanwhile. Raises UserError for fewer
    rows than workers, Interrupted if a signal comes while the ranks wait for room, and
    `ray.train.TrainingFailedError` after more than `max_failures` failures.
    """
    num_workers = project.training.max_workers
    parts = prepared.summary["parts"]
    if min(parts["train"]["rows"], parts["validation"]["rows"]) < num_workers:
        raise UserError(
            f"training.num_workers: {num_workers} workers need a row each in the training and the validation "
            f"part, which have {parts['train']['rows']:,} and {parts['validation']['rows']:,}"
        )
    while True:
        with progress.listening(on_epoch, on_note) as listener:
            signals = _fit_group(project, prepared, run, listener, on_note, stop, wrap)
            ending = listener.ending()
        assert ending is not None, "ranks that return have reported how they ended"
        if ending.outcome is not Outcome.MOVED or signals:
            return ending, signals
        on_note("a node is going away: a checkpoint is written, and the training continues on other nodes")


def _fit_group(
    project: Project,
    prepared: Prepared,
    run: Path,
    listener: Listener,
    on_note: Callable[[str], None],
    stop: threading.Event,
    wrap: Wrap,
) -> list[int]:
    """Run Ray Train once; returns the signals received, the first of which stops the ranks.

    Raises Interrupted if a signal comes while no ranks run, so that none can write a checkpoint.
    """
    training = project.training
    worker_resources, note = resources(project, training.min_workers)
    trainer = ElasticTrainer(
        train_on_worker,
        train_loop_config={
            "project": project.model_dump_json(),
            "prepared": str(prepared.path),
            "run": str(run),
            "progress": listener.actor,
            "wrap": wrap,
        },
        backend_config=_backend(project),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=use_gpu(project),
            resources_per_worker=worker_resources,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=ray.train.RunConfig(
            # A new name each time, so that Ray does not resume from its own snapshots: they may be incomplete
            # if the process is killed. Our checkpoints are never incomplete.
            name=f"{run.name}-{time.time_ns()}",
            storage_path=str(run / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            callbacks=[Transitions(listener.actor, is_elastic=not isinstance(training.num_workers, int))],
        ),
    )
    # In a daemon thread: in the main thread Ray would handle SIGINT itself and abort the ranks, and after a
    # second signal the process must not wait for `fit`, which may never return.
    future: Future[None] = Future()

    def run_trainer() -> None:
        try:
            trainer.fit()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    with stopping_on_signal(listener.stop) as signals:
        if note:
            on_note(note)
        threading.Thread(target=run_trainer, name="fit", daemon=True).start()
        noted = False
        while not future.done():
            wait_for([future], timeout=0.2)
            if (signals or stop.is_set()) and listener.is_waiting():
                number = signals[0] if signals else signal.SIGTERM
                raise Interrupted("it waited for room on the cluster, and trained nothing meanwhile", number)
            if signals and not noted:
                on_note("stopping after a checkpoint; the same signal again stops at once")
                noted = True
            if stop.is_set():
                listener.stop()
                stop = threading.Event()  # one request is enough
    future.result()
    overrides.report([*overrides.not_called("driver"), *listener.not_called()], on_note)
    return signals


def _backend(project: Project) -> BackendConfig:
    if project.training.max_workers == 1 and not project.training.timeline:
        return BackendConfig()  # one worker has no group to join
    if project.training.backend == "ddp":
        from app.training.workers.ddp import DdpConfig

        return DdpConfig(backend="nccl" if use_gpu(project) else "gloo")
    return horovod.HorovodConfig()


def resources(project: Project, num_workers: int) -> tuple[dict[str, float], str | None]:
    """The resources that each of `num_workers` workers takes, and a note for the user if they have to wait.

    Raises UserError if the cluster can never have room for them.
    """
    training = project.training
    setting = "training.num_workers x training.num_cpus"
    num_cpus, note = capacity.current().cpus_per_worker(training.num_cpus, num_workers, setting)
    return {"CPU": num_cpus} | ({"GPU": training.num_gpus} if use_gpu(project) else {}), note


def use_gpu(project: Project) -> bool:
    """Whether the workers train on GPUs. Raises UserError for `device: cuda` on a cluster without GPUs."""
    training = project.training
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if training.device == "cuda" and not num_gpus:
        raise UserError("training.device: cuda, but the cluster has no GPU; set auto or cpu")
    return training.device != "cpu" and num_gpus >= training.max_workers * training.num_gpus
