"""Runs of sweeps, with MLflow and SQLite."""

from datetime import datetime, timedelta

import pytest

from app.registry import connection, sweep_runs
from app.registry.sweep_runs import STUDY_TAG, TRIAL_TAG, CurvePoint, Trial
from tests.versions import project

STARTED = datetime(2026, 1, 1)


def trial(number: int, status: str = "FINISHED") -> Trial:
    return Trial(
        number=number,
        status=status,
        parameters={"training.learning_rate": 0.1},
        curves=[CurvePoint("hr@10", epoch, epoch / 10) for epoch in range(3)],
        values={"hr@10": 0.2},
        tags={"raylway.state": "complete"},
        started=STARTED,
        ended=STARTED + timedelta(seconds=5),
    )


def trials_of(runs: sweep_runs.SweepRuns) -> dict[str, object]:
    client = connection.client()
    experiment = client.get_run(runs.id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{runs.id}'"
    return {run.data.tags[TRIAL_TAG]: run for run in client.search_runs([experiment], query)}


def test_each_trial_is_a_nested_run():
    with sweep_runs.sweep(project("nested"), "study") as runs:
        runs.log(trial(0))
        runs.log(trial(1, "KILLED"))
    client = connection.client()
    parent = client.get_run(runs.id)
    assert (parent.info.status, parent.data.tags[STUDY_TAG]) == ("FINISHED", "study")
    trials = trials_of(runs)
    assert {number: run.info.status for number, run in trials.items()} == {"0": "FINISHED", "1": "KILLED"}
    first = trials["0"]
    assert first.data.params == {"training.learning_rate": "0.1"}
    assert first.info.end_time - first.info.start_time == 5000
    history = client.get_metric_history(first.info.run_id, "hr_at_10")
    assert sorted((metric.step, metric.value) for metric in history) == [
        (0, 0.0), (0, 0.2), (1, 0.1), (2, 0.2),
    ]  # fmt: skip


def test_a_resumed_sweep_logs_no_trial_twice():
    with sweep_runs.sweep(project("resumed-sweep"), "study") as first:
        first.log(trial(0))
    with sweep_runs.sweep(project("resumed-sweep"), "study") as second:
        second.log(trial(0))
        second.log(trial(1))
    assert second.id == first.id
    assert set(trials_of(second)) == {"0", "1"}


def test_an_error_of_a_write_ends_the_sweep_as_failed():
    with pytest.raises(Exception, match="status"), sweep_runs.sweep(project("broken"), "study") as runs:
        runs.log(trial(0, "NO_STATUS"))
    assert connection.client().get_run(runs.id).info.status == "FAILED"


def test_many_metrics_are_logged_in_batches(monkeypatch):
    monkeypatch.setattr(sweep_runs, "MAX_BATCH_METRICS", 2)
    with sweep_runs.sweep(project("batches"), "study") as runs:
        runs.log(trial(0))
    (logged,) = trials_of(runs).values()
    assert len(connection.client().get_metric_history(logged.info.run_id, "hr_at_10")) == 4
