"""Runs of sweeps in MLflow: one run per study, and a nested run per trial."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from mlflow.entities import Metric, Param, ViewType
from mlflow.tracking import MlflowClient

from app.config import Project
from app.registry.connection import client
from app.registry.experiments import ending, experiment_of, metric_name, run_with_tag

STUDY_TAG, TRIAL_TAG = "raylway.study", "raylway.trial"
"""Tag of a sweep's run with the name of its study, and tag of a nested run with the number of its trial."""
MAX_BATCH_METRICS = 1000
"""Maximum number of metrics that MLflow accepts at once."""
MAX_TRIALS = 50_000
"""Maximum number of runs that MLflow returns for a query."""


class CurvePoint(NamedTuple):
    """A metric's value at an epoch."""

    metric: str
    epoch: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Data of a finished trial that are logged to MLflow."""

    number: int
    status: str
    """MLflow's status: FINISHED, KILLED (stopped early) or FAILED."""
    parameters: Mapping[str, Any]
    curves: Sequence[CurvePoint]
    values: Mapping[str, float]
    tags: Mapping[str, str]
    started: datetime | None
    ended: datetime | None


class SweepRuns:
    """The run of a study and its nested runs. A thread writes them, so that no trial waits."""

    def __init__(self, client: MlflowClient, experiment: str, run_id: str):
        self.id = run_id
        self._client = client
        self._experiment = experiment
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        runs = client.search_runs([experiment], query, ViewType.ACTIVE_ONLY, max_results=MAX_TRIALS)
        # A run that has not ended was interrupted while it was written.
        self._runs = {run.data.tags[TRIAL_TAG]: run.info for run in runs if TRIAL_TAG in run.data.tags}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._writes: list[Future[None]] = []

    def log(self, trial: Trial) -> None:
        """Log a finished trial in the background, unless it is logged."""
        self._writes.append(self._writer.submit(self._log, trial))

    def _log(self, trial: Trial) -> None:
        run = self._runs.get(str(trial.number))
        if run is not None and run.status != "RUNNING":
            return
        if run is None:
            tags = {"mlflow.parentRunId": self.id, TRIAL_TAG: str(trial.number), **trial.tags}
            run = self._client.create_run(
                self._experiment,
                start_time=_milliseconds(trial.started),
                run_name=f"trial {trial.number}",
                tags=tags,
            ).info
        end_ms = _milliseconds(trial.ended)
        metrics = [Metric(metric_name(name), value, end_ms, epoch) for name, epoch, value in trial.curves]
        metrics += [Metric(metric_name(name), value, end_ms, 0) for name, value in trial.values.items()]
        parameters = [Param(key, str(value)) for key, value in trial.parameters.items()]
        for start in range(0, max(1, len(metrics)), MAX_BATCH_METRICS):
            batch = metrics[start : start + MAX_BATCH_METRICS]
            self._client.log_batch(run.run_id, batch, parameters if start == 0 else [])
        self._client.set_terminated(run.run_id, trial.status, end_ms)

    def close(self) -> None:
        """Wait until all trials are written. Raises the first error of a write."""
        self._writer.shutdown()
        for write in self._writes:
            write.result()


def _milliseconds(time: datetime | None) -> int:
    return int((time or datetime.now()).timestamp() * 1000)


@contextlib.contextmanager
def sweep(project: Project, study: str) -> Iterator[SweepRuns]:
    """The MLflow run of a study: the existing one, or a new one. It ends like the run of a training."""
    mlflow = client()
    experiment = experiment_of(mlflow, project.name)
    existing = run_with_tag(mlflow, experiment, STUDY_TAG, study)
    if existing is not None:
        run_id = existing.info.run_id
        mlflow.update_run(run_id, status="RUNNING")
    else:
        created = mlflow.create_run(experiment, run_name=f"sweep {study}", tags={STUDY_TAG: study})
        run_id = created.info.run_id
    runs = SweepRuns(mlflow, experiment, run_id)
    with ending(mlflow, run_id):
        try:
            yield runs
        finally:
            runs.close()
