"""Runs of trainings and sweeps in MLflow, with their metrics and files."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunStatus, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from app.bundle import manifest
from app.bundle.manifest import identity_of, verify
from app.config import Project
from app.errors import Interrupted, UserError, describe
from app.registry.artifacts import local_folder, stored_manifest
from app.registry.connection import client
from app.state import stages
from app.state.home import home

KEY_TAG = "raylway.key"
"""On a run: the key of its bundle, by which a restarted run is found again."""
STUDY_TAG, TRIAL_TAG = "raylway.study", "raylway.trial"
"""On the run of a sweep: the name of its study; on those below it: the number of the trial."""


class Run:
    """An MLflow run that a restarted training continues."""

    def __init__(self, client: MlflowClient, run_id: str, resumed: bool):
        self._client = client
        self.id = run_id
        self.resumed = resumed
        history = client.get_metric_history(run_id, "train_loss") if resumed else []
        self._logged = {metric.step for metric in history}

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """The metrics of an epoch, unless they are there: a resumed training repeats its last one."""
        step = int(metrics["epoch"])
        if step in self._logged:
            return
        self._logged.add(step)
        now = int(time.time() * 1000)
        values = [Metric(_named(n), value, now, step) for n, value in metrics.items() if n != "epoch"]
        self._client.log_batch(self.id, metrics=values)

    def log_results(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self.id, metrics=[Metric(_named(name), value, now, 0) for name, value in metrics.items()]
        )
        for name, value in tags.items():
            self._client.set_tag(self.id, name, value)

    def log_bundle(self, path: Path) -> str:
        """Store a bundle with the run's artifacts, under a name of its own; returns its URI.

        It is written once: what is there already, and whole, stays as it is.
        """
        root = self._client.get_run(self.id).info.artifact_uri
        name = f"bundle-{identity_of(path)[:16]}"
        try:
            self._store(path, root, name)
        except UserError:
            raise
        except Exception as error:  # of whatever library MLflow reaches the store with
            raise UserError(
                f"the bundle must be stored at {root}, where RAYLWAY_STORE led in this project's first run, "
                f"but: {describe(error)}. Make it reachable, and give the command again: nothing is lost"
            ) from error
        return f"{root}/{name}"

    def _store(self, path: Path, root: str, name: str) -> None:
        if (local := local_folder(root)) is not None:
            stages.place(local / name, lambda draft: manifest.copy(path, draft))
        elif stored_manifest(f"{root}/{name}") != (path / manifest.MANIFEST).read_bytes():
            for file in verify(path)["files"]:
                self._client.log_artifact(self.id, str(path / file), name)
            # Last: a bundle without it was not uploaded to its end.
            self._client.log_artifact(self.id, str(path / manifest.MANIFEST), name)


@contextlib.contextmanager
def run(project: Project, key: str, *, fresh: bool = False) -> Iterator[Run]:
    """The MLflow run that makes the bundle with this key: the one there is, or a new one.

    It ends FINISHED, KILLED if somebody stopped it, or FAILED if the body raises otherwise; a process that
    is killed leaves it RUNNING.
    """
    ours = client()
    experiment_id = _experiment(ours, project.name)
    query = f"tags.`{KEY_TAG}` = '{key}'"
    found = ours.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
    if found and not fresh:
        current = Run(ours, found[0].info.run_id, resumed=True)
        ours.update_run(current.id, status="RUNNING")
    else:
        created = ours.create_run(experiment_id, run_name=project.model.kind, tags={KEY_TAG: key})
        current = Run(ours, created.info.run_id, resumed=False)
        ours.log_batch(current.id, params=[Param(k, str(v)) for k, v in _parameters(project)])
    with _ending(ours, current.id):
        yield current


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is logged of a trial of a sweep."""

    number: int
    status: str
    """FINISHED, KILLED (stopped early) or FAILED, as MLflow calls it."""
    parameters: Mapping[str, Any]
    curves: Sequence[tuple[str, int, float]]
    """Metric, epoch and value."""
    values: Mapping[str, float]
    tags: Mapping[str, str]
    started: datetime | None
    ended: datetime | None


class SweepRuns:
    """The run of a study, and a nested run for each trial; written behind, so that no trial waits."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str):
        self.id = run_id
        self._client = client
        self._experiment = experiment_id
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        found = client.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, max_results=50_000)
        # One that is not ended was being written when the process was killed.
        self._runs = {r.data.tags[TRIAL_TAG]: r.info for r in found if TRIAL_TAG in r.data.tags}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._written: list[Future[None]] = []

    def log(self, trial: Trial) -> None:
        """Have a finished trial logged, unless it is."""
        self._written.append(self._writer.submit(self._log, trial))

    def _log(self, trial: Trial) -> None:
        known = self._runs.get(str(trial.number))
        if known is not None and known.status != "RUNNING":
            return
        if known is None:
            tags = {"mlflow.parentRunId": self.id, TRIAL_TAG: str(trial.number), **trial.tags}
            known = self._client.create_run(
                self._experiment,
                start_time=_milliseconds(trial.started),
                run_name=f"trial {trial.number}",
                tags=tags,
            ).info
        at = _milliseconds(trial.ended)
        metrics = [Metric(_named(name), value, at, step) for name, step, value in trial.curves]
        metrics += [Metric(_named(name), value, at, 0) for name, value in trial.values.items()]
        params = [Param(key, str(value)) for key, value in trial.parameters.items()]
        for first in range(0, max(1, len(metrics)), 1000):  # MLflow takes no more at once
            self._client.log_batch(known.run_id, metrics[first : first + 1000], params if first == 0 else [])
        self._client.set_terminated(known.run_id, trial.status, at)

    def close(self) -> None:
        """Until all is written. Raises what went wrong."""
        self._writer.shutdown()
        for written in self._written:
            written.result()


def _milliseconds(time_: datetime | None) -> int:
    return int((time_ or datetime.now()).timestamp() * 1000)


@contextlib.contextmanager
def sweep(project: Project, study: str) -> Iterator[SweepRuns]:
    """The MLflow run of a study, the one there is or a new one; its trials are runs below it."""
    ours = client()
    experiment_id = _experiment(ours, project.name)
    query = f"tags.`{STUDY_TAG}` = '{study}'"
    found = ours.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
    if found:
        run_id = found[0].info.run_id
        ours.update_run(run_id, status="RUNNING")
    else:
        run_id = ours.create_run(
            experiment_id, run_name=f"sweep {study}", tags={STUDY_TAG: study}
        ).info.run_id
    runs = SweepRuns(ours, experiment_id, run_id)
    with _ending(ours, run_id):
        try:
            yield runs
        finally:
            runs.close()


def _experiment(ours: MlflowClient, name: str) -> str:
    """The id of a project's experiment, which is made at the first call."""
    experiment = ours.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    artifacts = os.environ.get("RAYLWAY_STORE") or (home() / "artifacts").as_uri()
    try:
        # MLflow would note it for good, and find out when the first bundle is stored.
        get_artifact_repository(artifacts)
    except (MlflowException, ImportError) as error:
        raise UserError(
            f"RAYLWAY_STORE: must be a folder or URL of a store that MLflow has the means for; {artifacts}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    try:
        return ours.create_experiment(name, artifact_location=f"{artifacts}/{name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return _experiment(ours, name)  # another process made it meanwhile


@contextlib.contextmanager
def _ending(ours: MlflowClient, run_id: str) -> Iterator[None]:
    """End a run FINISHED, KILLED if somebody stops it, or FAILED if the block raises otherwise."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        ours.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
        raise
    except BaseException:
        ours.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))
        raise
    ours.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))


def _parameters(project: Project) -> Iterator[tuple[str, Any]]:
    yield "seed", project.seed
    for section in ("model", "training"):
        for key, value in getattr(project, section).model_dump().items():
            yield f"{section}.{key}", value


def _named(metric: str) -> str:
    """MLflow takes no @."""
    return metric.replace("@", "_at_")
