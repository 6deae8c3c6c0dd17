"""Runs of trainings, with MLflow and SQLite."""

import contextlib
import signal

import pytest

from app.errors import Interrupted, UserError
from app.registry import connection, runs
from tests.versions import project


def epoch(number: int, loss: float) -> dict[str, float]:
    return {"epoch": number, "train_loss": loss, "validation_auc": 0.5 + number / 10}


def losses(run: runs.Run) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in connection.client().get_metric_history(run.id, "train_loss")]


def status(run: runs.Run) -> str:
    return connection.client().get_run(run.id).info.status


def stopped(name: str, key: str, error: BaseException) -> runs.Run:
    """A run whose training stopped in its third epoch."""
    with contextlib.suppress(type(error)), runs.run(project(name), key) as run:
        for number in (0, 1):
            run.log_epoch(epoch(number, 1 - number / 10))
        raise error
    return run


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (RuntimeError(), "FAILED"),
        (UserError("a mistake"), "FAILED"),
        (Interrupted("a checkpoint is kept", signal.SIGTERM), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_the_status_of_a_run_tells_a_stop_from_a_failure(error, end):
    assert status(stopped("failed", type(error).__name__, error)) == end


def test_a_run_with_the_same_key_is_resumed_and_logs_no_epoch_twice():
    first = stopped("resumed", "key", KeyboardInterrupt())
    with runs.run(project("resumed"), "key") as second:
        assert status(second) == "RUNNING"
        for number in (1, 2, 2):
            second.log_epoch(epoch(number, 0.5))
    assert (second.id, second.resumed, first.resumed) == (first.id, True, False)
    assert losses(second) == [(0, 1.0), (1, 0.9), (2, 0.5)]
    assert status(second) == "FINISHED"


def test_another_key_or_fresh_makes_another_run():
    with runs.run(project("several"), "key") as first:
        first.log_epoch(epoch(0, 1.0))
    with runs.run(project("several"), "other") as other:
        pass
    with runs.run(project("several"), "key", fresh=True) as fresh:
        fresh.log_epoch(epoch(0, 0.7))
    assert len({first.id, other.id, fresh.id}) == 3
    assert {other.resumed, fresh.resumed} == {False}
    assert losses(first) == [(0, 1.0)]
    assert losses(fresh) == [(0, 0.7)]


def test_a_run_has_parameters_results_and_tags():
    with runs.run(project("described"), "key") as run:
        run.log_results({"auc": 0.9}, {"gate": "passed"})
    data = connection.client().get_run(run.id).data
    assert data.metrics == {"auc": 0.9}
    assert data.tags["gate"] == "passed"
    assert data.tags[runs.KEY_TAG] == "key"
    assert data.params.items() >= {"seed": "0", "model.kind": "mlp", "training.epochs": "1"}.items()


def test_a_store_that_fails_is_reported_with_advice(bundles, monkeypatch):
    def fail(*_):
        raise RuntimeError("no credentials\nand much more")

    with runs.run(project("failing"), "key") as run:
        monkeypatch.setattr(runs.stages, "place", fail)
        with pytest.raises(
            UserError, match=r"must be stored at file://.*, but: RuntimeError: no credentials\. "
        ):
            run.log_bundle(bundles[0])
