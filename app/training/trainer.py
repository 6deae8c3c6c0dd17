"""The second stage: a prepared project to a trained model, by Ray Train with Horovod."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import ray
import ray.data
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from app import models, store
from app.config import Project
from app.data import features
from app.data.features import Preprocessor
from app.data.prepare import LABEL, Prepared
from app.errors import UserError
from app.home import home
from app.models import tabular
from app.training import checkpoint, horovod, loop, progress, shards

CODE = (models, tabular, features, loop, checkpoint, shards, sys.modules[__name__])


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
        """The parameters (safetensors) of the epoch with the best validation AUC."""
        return self.path / "model.safetensors"


def key(project: Project, prepared: Prepared) -> str:
    """The name of this training: the same for a run that goes on after an interruption."""
    inputs = project.model_dump(include={"model", "training", "seed"})
    inputs["training"].pop("max_failures")
    return store.key("train", {**inputs, "prepared": prepared.key}, CODE)


def done(project: Project, prepared: Prepared) -> bool:
    """Whether this training has been done before."""
    return store.folder("train", key(project, prepared)).exists()


def train(
    project: Project, prepared: Prepared, on_epoch: Callable[[dict[str, float]], None], *, fresh: bool = False
) -> Trained:
    """Train, unless it has been done; an interrupted training goes on from its last checkpoint.

    `on_epoch` hears the metrics of each epoch as it ends. Needs Ray. Raises UserError if there are fewer
    rows than workers or the loss diverges, `ray.train.TrainingFailedError` once `max_failures` is spent.
    """
    name = key(project, prepared)
    target = store.folder("train", name)
    runs = home() / "runs"
    if fresh:
        shutil.rmtree(runs / name, ignore_errors=True)

    def build(draft: Path) -> None:
        best = _fit(project, prepared, name, runs, on_epoch)
        with best.as_directory() as folder:
            shutil.copy(Path(folder) / "model.safetensors", draft)
        last = max((runs / name).glob("epoch-*/state.json"))
        (draft / "history.json").write_text(json.dumps(json.loads(last.read_text())["history"], indent=1))

    built = store.produce(target, build, fresh=fresh)
    shutil.rmtree(runs / name, ignore_errors=True)  # its checkpoints have served
    return Trained(target, name, cached=not built)


def _fit(
    project: Project, prepared: Prepared, name: str, runs: Path, on_epoch: Callable
) -> ray.train.Checkpoint:
    training = project.training
    rows = prepared.summary["parts"]
    if min(rows["train"]["rows"], rows["validation"]["rows"]) < training.num_workers:
        raise UserError(
            f"training.num_workers: {training.num_workers} workers, but fewer rows than that to share out"
        )
    preprocessor = prepared.preprocessor
    datasets = {part: _matrix(prepared.part(part), preprocessor) for part in ("train", "validation")}
    with progress.listening(on_epoch) as teller:
        trainer = DataParallelTrainer(
            loop.train_loop,
            train_loop_config={
                "project": project.model_dump_json(),
                "preprocessor": preprocessor.model_dump_json(),
                "progress": teller,
            },
            backend_config=horovod.HorovodConfig(),
            datasets=datasets,
            dataset_config=shards.ContiguousShards(datasets, training.num_workers),
            scaling_config=ray.train.ScalingConfig(
                num_workers=training.num_workers, use_gpu=_use_gpu(project)
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(runs),
                failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="validation_auc", checkpoint_score_order="max"
                ),
            ),
        )
        result = trainer.fit()
        diverged = ray.get(teller.diverged.remote())
    if diverged is not None:
        raise UserError(
            f"the training diverged in epoch {diverged + 1}: its loss is no longer finite; lower "
            f"training.learning_rate (it is {training.learning_rate:g})"
        )
    assert result.best_checkpoints, "a finished run has a checkpoint of its last epoch"
    return max(result.best_checkpoints, key=lambda pair: pair[1]["validation_auc"])[0]


def _matrix(part: Path, preprocessor: Preprocessor) -> ray.data.Dataset:
    """A part as blocks of `x`, float32 (rows, width), and `y`, float32 (rows,), in a fixed order."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True

    def transform(frame: pd.DataFrame) -> dict[str, np.ndarray]:
        return {"x": preprocessor.transform(frame), "y": frame[LABEL].to_numpy(np.float32)}

    files = sorted(str(file) for file in part.glob("*.parquet"))
    return (
        ray.data.read_parquet(files)
        .map_batches(transform, batch_format="pandas", batch_size=None)
        .materialize()
    )


def _use_gpu(project: Project) -> bool:
    training = project.training
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if training.device == "cuda" and not num_gpus:
        raise UserError("training.device: cuda, but the cluster has no GPU; say auto or cpu")
    return training.device != "cpu" and num_gpus >= training.num_workers
