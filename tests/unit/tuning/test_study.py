"""The stored study, on SQLite."""

import multiprocessing
import sqlite3
import threading
import time

import optuna
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from app.errors import UserError
from app.state.home import POSTGRESQL_TIMEOUTS
from app.tuning import study as studies

RATE = {"rate": FloatDistribution(0.0, 1.0)}
SETTINGS = {"sweep": {"space": {"rate": [0, 1]}}, "project": {"training": {"epochs": 3}}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    return tmp_path


def opened(name: str = "s", settings: dict = SETTINGS, on_note=print):
    return studies.opened(name, ["maximize"], settings, on_note)


def stored() -> list:
    return studies.load("s").trials


def test_a_trial_goes_from_running_to_its_end():
    with opened() as study:
        number = study.begin({"rate": 0.5}, RATE, "a")
        assert [t.state for t in study.trials()] == [TrialState.RUNNING]
        study.report(number, 1, 0.7)
        study.report(number, 2, 0.8)
        study.finish(number, TrialState.COMPLETE, [0.8], {"epochs": 2})
    (trial,) = stored()
    assert (trial.number, trial.state, trial.value, trial.params) == (
        0,
        TrialState.COMPLETE,
        0.8,
        {"rate": 0.5},
    )
    assert trial.intermediate_values == {1: 0.7, 2: 0.8}
    assert trial.user_attrs["epochs"] == 2
    assert trial.datetime_start <= trial.datetime_complete


def test_an_interrupted_trial_waits_and_keeps_its_number_and_values():
    with opened() as study:
        number = study.begin({"rate": 0.5}, RATE, "a")
        study.report(number, 1, 0.7)
    with opened() as study:
        (waiting,) = study.trials()
        assert (waiting.state, waiting.params) == (TrialState.WAITING, {"rate": 0.5})
        assert waiting.intermediate_values == {1: 0.7}
        study.resume(waiting.number)
        study.finish(waiting.number, TrialState.PRUNED, None, {})
    assert [(t.number, t.state) for t in stored()] == [(0, TrialState.PRUNED)]


def test_a_repeated_call_has_the_effect_of_one():
    """A call is repeated if the response of the database was lost."""
    with opened() as study:
        assert study.begin({"rate": 0.5}, RATE, "a") == study.begin({"rate": 0.5}, RATE, "a") == 0
        assert study.begin({"rate": 0.5}, RATE, "b") == 1
        study.finish(0, TrialState.COMPLETE, [0.1], {})
        study.finish(0, TrialState.COMPLETE, [0.1], {})
    assert [t.state.name for t in stored()] == ["COMPLETE", "RUNNING"]


def test_other_settings_are_refused_and_named():
    with opened():
        pass
    other = {"sweep": {"space": {"rate": [0, 2]}}, "project": {"training": {"epochs": 3, "seed": 1}}}
    with pytest.raises(UserError) as error, opened(settings=other):
        pass
    assert "sweep.space.rate was [0, 1] and is [0, 2]" in str(error.value)
    assert 'project.training.seed was "nothing" and is 1' in str(error.value)
    with opened():
        pass  # the refused settings have not replaced the stored ones


def _hold(ready, done):
    with opened():
        ready.set()
        done.wait()


def test_one_process_has_a_study_at_a_time_until_it_is_killed():
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(ready, done), daemon=True)
    holder.start()
    ready.wait()
    with pytest.raises(UserError, match=f"swept by process {holder.pid}"), opened():
        pass
    with opened("another"):
        pass
    holder.kill()
    holder.join()
    with opened():
        pass


def test_a_call_waits_for_a_locked_database(home, monkeypatch):
    with opened() as study:
        number = study.begin({"rate": 0.5}, RATE, "a")
    notes: list[str] = []
    real = optuna.storages.RDBStorage
    short = {"connect_args": {"timeout": 0.1}}
    monkeypatch.setattr(studies, "RDBStorage", lambda url, engine_kwargs: real(url, engine_kwargs=short))
    with opened(on_note=notes.append) as study:
        study.resume(number)
        other = sqlite3.connect(home / "optuna.db", check_same_thread=False, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(1.0, other.execute, ["ROLLBACK"]).start()
        started = time.monotonic()
        study.report(number, 1, 0.7)
        assert time.monotonic() - started > 0.5
    other.close()
    assert stored()[0].intermediate_values == {1: 0.7}
    assert len(notes) == 1
    assert "locked" in notes[0]


def test_an_unreachable_database_ends_the_sweep_with_advice(home, monkeypatch):
    monkeypatch.setattr(studies, "WAIT_S", 0.1)
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{home}/no/such/folder/x.db")
    with pytest.raises(UserError, match="the same command resumes"), opened():
        pass


def test_a_missing_study_is_refused_with_the_names_of_the_others():
    with pytest.raises(UserError, match="raylway sweep"):
        studies.load("s")
    with opened("t"):
        pass
    with pytest.raises(UserError, match="there are t"):
        studies.load("s")


@pytest.mark.parametrize("url", ["postgresql://u@h/d", "postgres://u@h/d", "postgresql+psycopg://u@h/d"])
def test_studies_in_postgresql_have_their_own_schema(monkeypatch, url):
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", url)
    ours = f"{POSTGRESQL_TIMEOUTS}&options=-csearch_path%3Doptuna"
    assert studies.url() == f"postgresql+psycopg://u@h/d?{ours}"
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"{url}?sslmode=require")
    assert studies.url().endswith(f"d?sslmode=require&{ours}")


def test_load_notes_that_it_waits_for_the_database(monkeypatch):
    with opened():
        pass
    storage, notes = studies.RDBStorage, []

    def away(*arguments, **options):
        monkeypatch.setattr(studies, "RDBStorage", storage)
        raise sqlalchemy.exc.OperationalError("", {}, Exception("Connection refused"))

    monkeypatch.setattr(studies, "RDBStorage", away)
    studies.load("s", notes.append)
    assert notes == ["the database of studies does not answer (Connection refused); waiting for it"]
