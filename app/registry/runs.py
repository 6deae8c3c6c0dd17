"""Runs of trainings in MLflow, with their metrics and bundles."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from app.bundle import manifest
from app.bundle.manifest import identity_of, verify
from app.config import Project
from app.errors import UserError, describe
from app.registry.artifacts import local_folder, stored_manifest
from app.registry.connection import client
from app.registry.experiments import ending, experiment_of, metric_name, run_with_tag
from app.state import stages

KEY_TAG = "raylway.key"
"""Tag of a run with the key of its bundle, by which a restarted training finds its run."""


class Run:
    """An MLflow run that a restarted training continues."""

    def __init__(self, client: MlflowClient, run_id: str, resumed: bool):
        self._client = client
        self.id = run_id
        self.resumed = resumed
        history = client.get_metric_history(run_id, "train_loss") if resumed else []
        self._logged_epochs = {metric.step for metric in history}

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """Log an epoch's metrics, unless they are logged: a resumed training repeats its last epoch."""
        epoch = int(metrics["epoch"])
        if epoch in self._logged_epochs:
            return
        self._logged_epochs.add(epoch)
        self._log({name: value for name, value in metrics.items() if name != "epoch"}, epoch)

    def log_results(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Log the metrics of the whole run, and set its tags."""
        self._log(metrics, 0)
        for name, value in tags.items():
            self._client.set_tag(self.id, name, value)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._client.log_batch(
            self.id,
            metrics=[Metric(metric_name(name), value, now_ms, step) for name, value in metrics.items()],
        )

    def log_bundle(self, path: Path) -> str:
        """Store a bundle with the run's artifacts under its own name, and return its URI.

        A bundle that is already stored completely is not written again. Raises UserError if the store fails.
        """
        root = self._client.get_run(self.id).info.artifact_uri
        name = f"bundle-{identity_of(path)[:16]}"
        try:
            self._store(path, root, name)
        except UserError:
            raise
        except Exception as error:  # of any library by which MLflow reaches the store
            raise UserError(
                f"the bundle must be stored at {root}, which RAYLWAY_STORE named in this project's first "
                f"run, but: {describe(error)}. Make it reachable and run the command again: nothing is lost"
            ) from error
        return f"{root}/{name}"

    def _store(self, path: Path, root: str, name: str) -> None:
        if (folder := local_folder(root)) is not None:
            stages.place(folder / name, lambda draft: manifest.copy(path, draft))
        elif stored_manifest(f"{root}/{name}") != (path / manifest.MANIFEST).read_bytes():
            for file in verify(path)["files"]:
                self._client.log_artifact(self.id, str(path / file), name)
            # Last: a bundle without a manifest was not uploaded completely.
            self._client.log_artifact(self.id, str(path / manifest.MANIFEST), name)


@contextlib.contextmanager
def run(project: Project, key: str, *, fresh: bool = False) -> Iterator[Run]:
    """The MLflow run that makes the bundle with this key: the existing one, or with `fresh` a new one.

    It ends FINISHED, KILLED if the user stopped it, or FAILED if the block raises another error; a process
    that is killed leaves it RUNNING.
    """
    mlflow = client()
    experiment = experiment_of(mlflow, project.name)
    existing = run_with_tag(mlflow, experiment, KEY_TAG, key)
    if existing is not None and not fresh:
        current = Run(mlflow, existing.info.run_id, resumed=True)
        mlflow.update_run(current.id, status="RUNNING")
    else:
        created = mlflow.create_run(experiment, run_name=project.model.kind, tags={KEY_TAG: key})
        current = Run(mlflow, created.info.run_id, resumed=False)
        parameters = [Param(name, str(value)) for name, value in _parameters(project)]
        mlflow.log_batch(current.id, params=parameters)
    with ending(mlflow, current.id):
        yield current


def _parameters(project: Project) -> Iterator[tuple[str, Any]]:
    yield "seed", project.seed
    for section in ("model", "training"):
        for key, value in getattr(project, section).model_dump().items():
            yield f"{section}.{key}", value
