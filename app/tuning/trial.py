"""One trial: a real training in a process of Ray Tune, which tells of each epoch."""

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
"""How long a training may take to write its checkpoint and end."""
LATENCY_REPEATS = 100
WORST = 1e30
"""Reported of a trial that failed: a number that schedulers can sort, since Tune wants one."""

Epochs = Sequence[Mapping[str, float]]


class Trial(tune.Trainable):
    """Trains the project of one point; `step` gives the next epoch's results.

    A result has `epochs` (trained so far, of all folds), a value for each objective, and with the last one
    `finished`, `history` and the keys of the trainings that it `made`; or `failed`, if trying again would
    come to the same.
    """

    def setup(self, config: dict[str, Any], settings: dict[str, Any]) -> None:
        """`settings`: `home`, `project` as JSON with its sweep, `prepared` (the folder of each fold, if all
        trials share them) and `here`, whether one worker trains in this process."""
        os.environ["RAYLWAY_HOME"] = settings["home"]
        self._project = Project.model_validate_json(settings["project"])
        self._here = settings["here"]
        self._prepared: list[str] = settings["prepared"]
        self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._point = dict(config)
        self._results: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._origin: Path | None = None
        self._key = ""

    def step(self) -> dict[str, Any]:
        # Begun here and not before: a checkpoint to begin with may come after `setup`.
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="training", daemon=True)
            self._thread.start()
        result = self._results.get()
        if isinstance(result, UserError):
            sweep = self._project.sweep
            assert sweep
            ways = zip(sweep.objectives, sweep.directions, strict=True)
            worst = {name: WORST if way == "minimize" else -WORST for name, way in ways}
            return {**worst, "epochs": 0, "failed": str(result), "done": True}
        if isinstance(result, BaseException):
            raise result
        return result

    def cleanup(self) -> None:
        """End the training, with a checkpoint that it can go on from."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another point, in this process."""
        self.cleanup()
        if self._thread is not None and self._thread.is_alive():
            return False
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For population based training: the last checkpoint of the network."""
        if self._key and (found := self._checkpoint(self._key)):
            shutil.copytree(found, Path(checkpoint_dir) / found.name)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from the checkpoint of another, or of this one before it was paused."""
        self._origin = Path(tempfile.mkdtemp(prefix="raylway-"))
        shutil.copytree(checkpoint_dir, self._origin, dirs_exist_ok=True)

    def _checkpoint(self, key: str) -> Path | None:
        settings = self._project.training.checkpoints
        return Checkpoints(trainer.checkpoints_of(key), settings).latest(print)

    def _history(self, key: str) -> list[Mapping[str, float]]:
        """The epochs of a training that was interrupted."""
        found = self._checkpoint(key)
        return checkpoint.state(found)["history"] if found else []

    def _train(self) -> None:
        try:
            self._results.put(self._trained())
        except Interrupted:
            pass  # nobody waits for it
        except BaseException as error:
            self._results.put(error)

    def _trained(self) -> dict[str, Any]:
        """Train all folds; returns the last result."""
        sweep = self._project.sweep
        assert sweep
        project = Space(self._project).project(self._point)
        started = time.perf_counter()
        histories: list[Epochs] = []
        made: list[str] = []
        for fold in range(sweep.folds or 1):
            of_fold = with_fold(project, fold, sweep.folds) if sweep.folds else project
            prepared = (
                Prepared(Path(self._prepared[fold]), cached=True) if self._prepared else prepare(of_fold)
            )
            task = task_of(of_fold, prepared)
            trained = self._fold(of_fold, prepared, task, histories)
            histories.append(trained.history)
            made += [] if trained.cached else [trained.key]
        values = {
            n: statistics.fmean(_values(h, task.score)[n] for h in histories) for n in _names(histories)
        }
        if set(sweep.objectives) & set(EXPORTED):
            values |= _exported(task, trained)
        seconds = time.perf_counter() - started
        return {
            **values,
            "epochs": sum(len(history) for history in histories),
            "history": json.dumps(histories),
            "made": made,
            "core_seconds": seconds * project.training.max_workers * project.training.num_cpus,
            "finished": True,
            "done": True,
        }

    def _fold(self, project: Project, prepared: Prepared, task: Task, before: list[Epochs]) -> Trained:
        """Train one fold, and tell of each epoch but the very last: that is told with the end."""
        assert self._project.sweep
        lineage = uuid.uuid4().hex if self._origin else ""
        key = trainer.key(project, prepared, lineage)
        if self._origin is not None:
            shutil.move(self._origin, trainer.checkpoints_of(key))
            self._origin = None
        self._key = key
        history = self._history(key)
        last = len(before) + 1 == (self._project.sweep.folds or 1)

        def on_epoch(metrics: dict[str, float]) -> None:
            history.append(metrics)
            if last and len(history) == project.training.epochs:
                return
            so_far = [*before, history]
            values = {n: statistics.fmean(_values(h, task.score)[n] for h in so_far) for n in _names(so_far)}
            epochs = sum(len(h) for h in so_far)
            result = {**values, "epochs": epochs, "run": key}
            self._results.put(result)

        return trainer.train(
            project, prepared, on_epoch, print, lineage=lineage, stop=self._stop, in_process=self._here
        )


def with_fold(project: Project, fold: int, folds: int) -> Project:
    """The project that is validated on one of its folds."""
    split = project.data.split.model_copy(update={"fold": (fold, folds)})
    return project.model_copy(update={"data": project.data.model_copy(update={"split": split})})


def _names(histories: Sequence[Epochs]) -> list[str]:
    names = histories[0][0]
    return [n.removeprefix("validation_") for n in names if n.startswith("validation_")]


def _values(history: Epochs, score: str) -> dict[str, float]:
    """The validation metrics of the epoch whose parameters are kept: the one with the best score."""
    best = max(history, key=lambda metrics: metrics[f"validation_{score}"])
    return {n.removeprefix("validation_"): v for n, v in best.items() if n.startswith("validation_")}


def _exported(task: Task, trained: Trained) -> dict[str, float]:
    """Size, and median time of one row on one core, of the graph that would be served."""
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
        opened = Bundle(folder, sealed=False)
        row = task.prepared.frame("test").head(1)
        columns = {i.name: row[i.name].to_numpy() for i in schema.inputs}
        seconds = []
        for _ in range(LATENCY_REPEATS):
            started = time.perf_counter()
            opened.answer(columns)
            seconds.append(time.perf_counter() - started)
        size = (folder / "model.onnx").stat().st_size
    return {"latency_ms": statistics.median(seconds) * 1e3, "size_mb": size / 1e6}
