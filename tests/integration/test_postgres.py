"""PostgreSQL stores studies, MLflow's tables, the audit log, predictions and feedback."""

import asyncio
import threading
import time

import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from optuna.exceptions import StorageInternalError

from app.errors import UserError
from app.registry import connection
from app.serving.replica.feedback_writer import NotStored
from app.serving.replica.prediction_writer import REFUSED
from app.serving.replica.recorder import Recorder
from app.state.audit import Audit
from app.state.audit_head import BrokenLog
from app.state.feedback import FeedbackStatus
from app.state.locks import Busy, exclusive
from app.state.records import Records
from app.tuning import study as studies
from app.tuning import tuner
from app.tuning.progress import Progress
from app.tuning.space import Space
from tests.integration.test_sweep import NO_SCHEDULER, SMOKE, project, run, states
from tests.records import (
    AWKWARD,
    VERSION_1,
    add,
    awkward,
    check_migrated,
    feedback,
    prediction,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def database(server, ray_cluster, monkeypatch):
    """RAYLWAY_DATABASE_URL, with the scheme that users write."""
    url = server.url().replace("postgresql+psycopg", "postgresql")
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", url)
    return url


def test_the_command_stores_the_study_and_mlflow_in_one_database(database, raylway):
    done = raylway("sweep", SMOKE, "--trials", "3", "--set", "sweep.study=pg", RAYLWAY_DATABASE_URL=database)
    assert done.returncode == 0, done.stdout + done.stderr
    study = studies.load("pg")
    assert len(study.trials) == 3
    runs = connection.client().search_runs(["1"], "tags.`raylway.trial` != ''")
    assert len(runs) == 3


def test_a_sweep_survives_a_crash_of_the_server(database, server):
    swept = project("crash", trials=6, scheduler=NO_SCHEDULER)
    crashed = threading.Event()

    def watch(progress: Progress) -> None:
        if len(progress.trials) == 2 and not crashed.is_set():
            crashed.set()
            server.stop()
            threading.Timer(5, server.start).start()

    notes: list[str] = []
    progress = tuner.run(swept, watch, notes.append)
    assert states(progress) == ["COMPLETE"] * 6
    assert any("does not answer" in note for note in notes)
    trials = studies.load("crash").trials
    assert [trial.number for trial in trials] == list(range(6))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}


def test_two_sweeps_of_one_study_cannot_run_at_once(database, raylway):
    swept = project("locked")
    with studies.opened("locked", ["maximize"], tuner.shared_settings(Space(swept)), print):
        with pytest.raises(UserError, match="is being swept"):
            run(swept)
        done = raylway("sweep", SMOKE, "--set", "sweep.study=locked", RAYLWAY_DATABASE_URL=database)
        assert done.returncode == 2
        assert "is being swept" in done.stderr
    assert len(run(swept).trials) == 3


def at_once(function, times=4):
    threads = [threading.Thread(target=function) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_predictions_and_feedback_sent_by_four_writers_are_stored_once(database):
    statuses = []

    def store():
        own = Records()
        add(own, *(prediction(f"p{n}", model="pg", at=float(n)) for n in range(50)))
        statuses.extend(own.add_feedback([feedback(f"p{n}") for n in range(20)], 1000))
        own.close()

    at_once(store)
    assert sorted(status.value for status in statuses) == ["stored"] * 20 + ["stored before"] * 60
    records = Records()
    stored = records.predictions("pg")
    assert [p.request_id for p in stored] == [f"p{n}" for n in range(50)]
    assert (stored[0].rows, stored[0].answer) == ([{"age": 39, "workclass": None}], [{"probability": 0.1}])
    assert records.add_feedback([feedback("p0", {"reward": 0.0}), feedback("p99")], 20) == [
        FeedbackStatus.CONFLICT, FeedbackStatus.QUARANTINED,
    ]  # fmt: skip
    assert {f.request_id for f in records.feedback("income")} == {f"p{n}" for n in range(20)}
    records.close()


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_are_read_as_they_were_stored(database, text):
    records = Records()
    original = awkward(text)
    add(records, original)
    assert records.predictions("income", [original.request_id]) == [original]
    records.close()


def test_concurrent_writers_extend_one_chain_of_the_audit_log(database):
    def write():
        own = Audit()
        for _ in range(10):
            own.add("traffic", "pg", {"salt": "ü"})
        own.close()

    at_once(write)
    audit = Audit()
    assert len(audit.entries("pg")) == 40
    with audit._engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE audit SET who = 'eve' WHERE number = 7"))
    with pytest.raises(BrokenLog, match="see its entry 7"):
        audit.entries()
    with audit._engine.begin() as connection:
        connection.execute(sqlalchemy.text("DELETE FROM audit"))
    audit.close()


def test_a_lock_in_the_database_is_exclusive(database):
    order = []

    def count():
        with exclusive("pg"):
            order.append("in")
            time.sleep(0.05)
            order.append("out")

    with exclusive("pg"), pytest.raises(Busy), exclusive("pg", wait=False):
        pass
    with exclusive("pg"), exclusive("another", wait=False):
        pass
    at_once(count)
    assert order == ["in", "out"] * 4


def test_predictions_wait_for_a_crashed_server_and_feedback_must_be_sent_again(database, server):
    recorder = Recorder(Records(), 1000)

    async def send_feedback(request_id):
        try:
            return await recorder.add_feedback(feedback(request_id))
        except NotStored:
            return None

    try:
        recorder.add(prediction("before", model="crash"))
        recorder.add(prediction("nul", model="crash", unit="\0"))  # PostgreSQL rejects NUL
        assert asyncio.run(send_feedback("c1")) == FeedbackStatus.STORED
        server.stop()
        try:
            recorder.add(prediction("meanwhile", model="crash"))
            assert asyncio.run(send_feedback("c2")) is None
        finally:
            server.start()
        assert asyncio.run(send_feedback("c2")) == FeedbackStatus.STORED
        assert asyncio.run(send_feedback("c1")) == FeedbackStatus.DUPLICATE
    finally:
        recorder.close()
    records = Records()
    assert {p.request_id for p in records.predictions("crash")} == {"before", "meanwhile"}
    assert recorder.status().dropped == {REFUSED: 1}
    records.close()


def test_the_tables_of_an_older_raylway_are_upgraded(server, monkeypatch):
    engine = sqlalchemy.create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE older"))
    engine.dispose()
    engine = sqlalchemy.create_engine(server.url("older"))
    rows = "convert_to('[{\"age\": 1}]', 'UTF8')"
    with engine.begin() as connection:
        connection.exec_driver_sql(VERSION_1.format(bytes="BYTEA", rows=rows))
    engine.dispose()
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", server.url("older"))
    records = Records()

    def read():
        own = Records()
        assert len(own.predictions("income")) == 3
        own.close()

    at_once(read)
    check_migrated(records)
    records.close()


def test_a_server_that_does_not_answer_is_an_error(server, database, monkeypatch):
    """The server's processes are suspended, but the kernel still accepts connections for them."""
    monkeypatch.setattr("app.state.engine.STATEMENT_TIMEOUT_S", 1.0)
    records = Records()
    add(records, prediction("hangs", model="hang"))
    recorder = Recorder(records, 10)
    registry, storage = connection.client(), studies._storage()
    registry.search_registered_models()
    with server.frozen():
        # MLflow and Optuna have their own engines.
        with pytest.raises(MlflowException, match=r"timeout expired|does not answer"):
            registry.search_registered_models()
        with pytest.raises(StorageInternalError):
            storage.get_all_studies()
        with pytest.raises(sqlalchemy.exc.OperationalError):  # on an open connection
            records.predictions("hang")
        with pytest.raises(sqlalchemy.exc.OperationalError):  # on a new connection
            Records().predictions("hang")
        recorder.add(prediction("waits", model="hang"))
        with pytest.raises(NotStored):
            asyncio.run(recorder.add_feedback(feedback("hangs")))
    recorder.close()
    storage.engine.dispose()
    records = Records()
    assert {p.request_id for p in records.predictions("hang")} == {"hangs", "waits"}
    records.close()


def test_a_sweep_on_a_server_that_is_down_is_refused(database, server, monkeypatch):
    monkeypatch.setattr(studies, "WAIT_S", 2.0)
    server.stop()
    try:
        with pytest.raises(UserError, match="the database of studies has not answered"):
            run(project("away"))
    finally:
        server.start()
