"""One trial of a sweep: a whole training in a process of Ray Tune, which reports each epoch."""

import json
import os
import queue
import shutil
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from app.config import Project
from app.config.sweep import EXPORTED
from app.data.prepare import Prepared, prepare
from app.errors import Interrupted, UserError
from app.tasks import Task, packager_of, task_of
from app.training import checkpoint, trainer
from app.training.checkpoint import Checkpoints
from app.training.trainer import Trained
from app.tuning.space import Space

STOP_TIMEOUT_S = 60.0
"""Maximum time that a training may take to write its checkpoint and end."""
NUM_LATENCY_RUNS = 100
"""Number of predictions whose median duration is the latency."""
WORST_VALUE = 1e30
"""Magnitude of the values of a failed trial: schedulers need a number that they can sort."""

History = Sequence[Mapping[str, float]]
"""Metrics of each epoch of one training."""


class Trial(tune.Trainable):
    """Trains the project of one point; `step` returns the results of the next epoch.

    A result has `epochs` (number of completed epochs, over all folds), a value for each objective and `run`
    (the key of the training). The last result has `finished`, `history` (JSON, of all folds), `core_seconds`
    and `made` (the keys of the trainings that were not cached) instead of `run`. A training that would fail
    again has one result, with the error message as `failed`.
    """

    def setup(self, config: dict[str, Any], settings: dict[str, Any]) -> None:
        """Tune calls this once in a new process. `config` is the point.

        `settings` has `home`, `project` (JSON, with its sweep), `prepared` (the folder of each fold, empty
        unless all trials share the data) and `in_process` (whether to train the only worker in this process).
        """
        os.environ["RAYLWAY_HOME"] = settings["home"]
        self._project = Project.model_validate_json(settings["project"])
        self._in_process = settings["in_process"]
        self._prepared: list[str] = settings["prepared"]
        self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        """Set the state of a new trial; the training starts at the first `step`."""
        self._point = dict(config)
        self._results: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._initial_checkpoints: Path | None = None
        self._key = ""

    def step(self) -> dict[str, Any]:
        # The training starts here and not in `setup`, because Tune may call `load_checkpoint` in between.
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="training", daemon=True)
            self._thread.start()
        result = self._results.get()
        if isinstance(result, UserError):
            sweep = self._project.sweep
            assert sweep
            directions = zip(sweep.objectives, sweep.directions, strict=True)
            worst = {name: WORST_VALUE if d == "minimize" else -WORST_VALUE for name, d in directions}
            return {**worst, "epochs": 0, "failed": str(result), "done": True}
        if isinstance(result, BaseException):
            raise result
        return result

    def cleanup(self) -> None:
        """End the training with a checkpoint."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin a trial of another point in this process. Returns False if the previous one does not end."""
        self.cleanup()
        if self._thread is not None and self._thread.is_alive():
            return False
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the training's last checkpoint, for population based training."""
        if self._key and (latest := self._latest_checkpoint(self._key)):
            shutil.copytree(latest, Path(checkpoint_dir) / latest.name)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Start from a checkpoint of another trial, or of this one before it was paused."""
        self._initial_checkpoints = Path(tempfile.mkdtemp(prefix="raylway-"))
        shutil.copytree(checkpoint_dir, self._initial_checkpoints, dirs_exist_ok=True)

    def _latest_checkpoint(self, key: str) -> Path | None:
        settings = self._project.training.checkpoints
        return Checkpoints(trainer.checkpoints_of(key), settings).latest(print)

    def _stored_history(self, key: str) -> list[Mapping[str, float]]:
        """Metrics of the completed epochs of an interrupted training."""
        latest = self._latest_checkpoint(key)
        return checkpoint.read_state(latest)["history"] if latest else []

    def _train(self) -> None:
        """Train all folds, and put the last result, or the exception, into the queue."""
        try:
            self._results.put(self._train_folds())
        except Interrupted:
            pass  # `cleanup` has stopped the training; no one reads another result
        except BaseException as error:
            self._results.put(error)

    def _train_folds(self) -> dict[str, Any]:
        """Train all folds and return the last result."""
        sweep = self._project.sweep
        assert sweep
        project = Space(self._project).project(self._point)
        started = time.perf_counter()
        histories: list[History] = []
        trained_keys: list[str] = []
        for fold in range(sweep.folds or 1):
            fold_project = with_fold(project, fold, sweep.folds) if sweep.folds else project
            prepared = (
                Prepared(Path(self._prepared[fold]), cached=True) if self._prepared else prepare(fold_project)
            )
            task = task_of(fold_project, prepared)
            trained = self._train_fold(fold_project, prepared, task, histories)
            histories.append(trained.history)
            trained_keys += [] if trained.cached else [trained.key]
        values = _mean_values(histories, task.score)
        if set(sweep.objectives) & set(EXPORTED):
            values |= _export_metrics(task, trained)
        seconds = time.perf_counter() - started
        return {
            **values,
            "epochs": sum(len(history) for history in histories),
            "history": json.dumps(histories),
            "made": trained_keys,
            "core_seconds": seconds * project.training.max_workers * project.training.num_cpus,
            "finished": True,
            "done": True,
        }

    def _train_fold(
        self, project: Project, prepared: Prepared, task: Task, earlier: list[History]
    ) -> Trained:
        """Train one fold, and put a result into the queue for each epoch except the last of the last fold.

        `earlier` has the histories of the folds before it.
        """
        assert self._project.sweep
        lineage = uuid.uuid4().hex if self._initial_checkpoints else ""
        key = trainer.key(project, prepared, lineage)
        if self._initial_checkpoints is not None:
            shutil.move(self._initial_checkpoints, trainer.checkpoints_of(key))
            self._initial_checkpoints = None
        self._key = key
        history = self._stored_history(key)
        is_last_fold = len(earlier) + 1 == (self._project.sweep.folds or 1)

        def on_epoch(metrics: dict[str, float]) -> None:
            history.append(metrics)
            if is_last_fold and len(history) == project.training.epochs:
                return
            histories = [*earlier, history]
            epochs = sum(len(h) for h in histories)
            self._results.put({**_mean_values(histories, task.score), "epochs": epochs, "run": key})

        return trainer.train(
            project, prepared, on_epoch, print, lineage=lineage, stop=self._stop, in_process=self._in_process
        )


def with_fold(project: Project, fold: int, num_folds: int) -> Project:
    """The project with fold number `fold`, from 0, as its validation part."""
    split = project.data.split.model_copy(update={"fold": (fold, num_folds)})
    return project.model_copy(update={"data": project.data.model_copy(update={"split": split})})


def _mean_values(histories: Sequence[History], score: str) -> dict[str, float]:
    """The validation metrics of the best epoch, whose parameters are kept, averaged over folds."""
    best = [max(history, key=lambda metrics: metrics[f"validation_{score}"]) for history in histories]
    names = [name for name in histories[0][0] if name.startswith("validation_")]
    return {name.removeprefix("validation_"): statistics.fmean(m[name] for m in best) for name in names}


def _export_metrics(task: Task, trained: Trained) -> dict[str, float]:
    """Size in MB of the graph that would be served, and its median latency in ms for one row on one core."""
    from safetensors.torch import load_file

    from app.bundle.bundle import Bundle

    network = task.network()
    network.load_state_dict(load_file(trained.weights))
    with tempfile.TemporaryDirectory(prefix="raylway-") as name:
        folder = Path(name)
        packager = packager_of(task)
        packager.export(network, folder)
        schema = packager.schema()
        (folder / "schema.json").write_text(schema.model_dump_json())
        bundle = Bundle(folder, sealed=False)
        row = task.prepared.frame("test").head(1)
        columns = {i.name: row[i.name].to_numpy() for i in schema.inputs}
        predict = bundle.rank if schema.task == "ranking" else bundle.predict
        seconds = []
        for _ in range(NUM_LATENCY_RUNS):
            started = time.perf_counter()
            predict(columns)
            seconds.append(time.perf_counter() - started)
        size_bytes = (folder / "model.onnx").stat().st_size
    return {"latency_ms": statistics.median(seconds) * 1e3, "size_mb": size_bytes / 1e6}
