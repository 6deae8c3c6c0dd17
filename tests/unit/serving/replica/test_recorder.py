import asyncio
import threading
import time

import pytest
from sqlalchemy.exc import DataError, OperationalError, TimeoutError

from app.serving.replica import recorder
from app.serving.replica.recorder import CLOSED, FULL, OVERHEAD_BYTES, REFUSED, REPEATED, NotStored, Recorder
from app.state.records import Feedback, Records, Verdict, decode
from tests.unit.state.test_records import prediction


class Database:
    """Takes what is written, or fails with `fault`."""

    def __init__(self):
        self.fault = None
        self.written, self.batches = [], []
        self.closed = False

    def add(self, encoded):
        predictions = [decode(each) for each in encoded]
        self._check([p.request_id for p in predictions])
        self.written += predictions
        return len(predictions)

    def judge(self, given, per_hour):
        self._check([f.request_id for f in given])
        self.batches.append(list(given))
        return [Verdict.STORED] * len(given)

    def predictions(self, model, request_ids, principal):
        self._check([])
        return [
            p
            for p in self.written
            if (p.model, p.principal) == (model, principal) and p.request_id in request_ids
        ]

    def close(self):
        self.closed = True

    def _check(self, request_ids):
        if self.fault:
            raise self.fault
        if "never" in request_ids:
            raise DataError("INSERT", {}, Exception("cannot be stored"))
        if "odd" in request_ids:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")


AWAY = OperationalError("INSERT", {}, Exception("away"))
FAULTS = [
    AWAY,
    OperationalError("INSERT", {}, Exception("database is locked")),
    TimeoutError("QueuePool limit of size 5 overflow 10 reached"),
    OSError("disk"),
    RuntimeError("not foreseen"),
]


@pytest.fixture
def database():
    return Database()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(recorder, "EVERY_S", 0.01)
    monkeypatch.setattr(recorder, "RETRY_S", 0.01)


@pytest.fixture
def writer(database):
    made = Recorder(database, 10)
    yield made
    made.close()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def feedback(request_id):
    return Feedback("income", request_id, {"reward": 1.0}, "bob", 0.0, "bob")


def ids(database):
    return [p.request_id for p in database.written]


def test_predictions_are_written_behind_and_all_at_the_end(database):
    writer = Recorder(database, 10)
    writer.add(prediction("a"))
    until(lambda: len(database.written) == 1)
    for number in range(5000):
        writer.add(prediction(str(number)))
    writer.close()
    assert ids(database) == ["a", *map(str, range(5000))]
    assert not writer.recording().dropped
    assert database.closed


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_whatever_fails_is_tried_again_and_nothing_is_lost(database, writer, fault):
    database.fault = fault
    for number in range(10):
        writer.add(prediction(str(number)))
    until(lambda: writer.recording().fault)
    assert writer.recording().waiting == 10
    database.fault = None
    until(lambda: len(database.written) == 10)
    until(lambda: writer.recording().fault is None)
    assert (writer.recording().waiting, writer.recording().waiting_bytes) == (0, 0)
    assert not writer.recording().dropped
    writer.add(prediction("later"))
    until(lambda: ids(database)[-1] == "later")


def test_a_write_is_tried_a_last_time_before_the_end(database, monkeypatch):
    monkeypatch.setattr(recorder, "RETRY_S", 60)
    database.fault = AWAY
    writer = Recorder(database, 10)
    writer.add(prediction("a"))
    until(lambda: writer.recording().fault)  # it was tried, and the next time is in a minute
    database.fault = None
    writer.close()
    assert (ids(database), writer.recording().dropped) == (["a"], {})


def test_the_end_does_not_wait_for_a_database_that_hangs(monkeypatch):
    monkeypatch.setattr(recorder, "CLOSE_S", 0.05)
    hanging, released = Database(), threading.Event()
    hanging.add = lambda encoded: released.wait(30)
    writer = Recorder(hanging, 10)
    writer.add(prediction("a"))
    writer.close()
    assert writer.recording().dropped == {CLOSED: 1}
    released.set()


def test_what_waits_is_bounded_in_bytes_and_what_is_lost_is_counted(database, monkeypatch):
    database.fault = AWAY
    writer = Recorder(database, 10)
    size = writer.add(prediction("a", rows=[{"text": "x" * 10_000}]))
    assert size > 10_000
    monkeypatch.setattr(recorder, "MAX_WAITING_BYTES", 5 * (size + OVERHEAD_BYTES))
    for number in range(20):
        writer.add(prediction(str(number), rows=[{"text": "x" * 10_000}]))
    assert writer.recording().dropped == {FULL: 16}
    assert writer.recording().waiting_bytes <= 5 * (size + OVERHEAD_BYTES)
    writer.close()  # it does not hang, though the database is away
    assert (len(database.written), writer.recording().dropped) == (0, {FULL: 16, CLOSED: 5})


@pytest.mark.parametrize("bad", ["never", "odd"])
def test_what_the_database_never_takes_keeps_nothing_else_from_it(database, bad):
    async def say():
        given = (writer.judge(feedback(request_id)) for request_id in ("a", bad, "b"))
        return await asyncio.gather(*given, return_exceptions=True)

    writer = Recorder(database, 10)
    for request_id in ("a", bad, "b"):
        writer.add(prediction(request_id))
    first, refused, last = asyncio.run(say())
    assert (first, last) == (Verdict.STORED, Verdict.STORED)
    assert isinstance(refused, NotStored)
    until(lambda: len(database.written) == 2)
    writer.add(prediction("c"))
    writer.close()
    assert ids(database) == ["a", "b", "c"]
    assert writer.recording().dropped == {REFUSED: 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"principal": "\ud800"},
        {"rows": [{"text": "\udfff"}]},
        {"rows": [{"age": 2**70}]},
        {"answer": [object()]},
    ],
    ids=["principal", "text", "number", "answer"],
)
def test_what_json_has_no_word_for_is_dropped_alone(database, writer, changes):
    assert writer.add(prediction("bad", **changes)) == 0
    writer.add(prediction("good"))
    until(lambda: ids(database) == ["good"])
    assert writer.recording().dropped == {REFUSED: 1}


def test_a_real_database_that_is_locked_gets_all_later(monkeypatch):
    monkeypatch.setattr("app.state.database.STATEMENT_TIMEOUT_S", 0.05)
    records, other = Records(), Records()
    with other._database.begin() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        writer = Recorder(records, 10)
        writer.add(prediction("a"))
        until(lambda: writer.recording().fault)
        assert "locked" in writer.recording().fault
        with pytest.raises(NotStored, match="locked"):
            asyncio.run(writer.judge(feedback("a")))
    until(lambda: not writer.recording().waiting)
    writer.close()
    assert [p.request_id for p in other.predictions("income")] == ["a"]
    other.close()


def test_a_request_id_given_twice_is_counted(writer, database):
    database.fault = AWAY
    writer.add(prediction("a"))
    writer.add(prediction("a", version="2"))
    writer.add(prediction("a", principal="ann"))
    writer.add(prediction("a", variant="new", role="shadow"))
    assert writer.recording().dropped == {REPEATED: 1}
    database.fault = None
    until(lambda: len(database.written) == 3)


def test_feedback_that_comes_together_is_written_together(database, writer):
    async def say():
        return await asyncio.gather(*(writer.judge(feedback(str(n))) for n in range(200)))

    assert asyncio.run(say()) == [Verdict.STORED] * 200
    assert len(database.batches) < 50


def test_feedback_is_not_acknowledged_while_the_database_is_away(database, writer):
    database.fault = AWAY
    with pytest.raises(NotStored, match="away"):
        asyncio.run(writer.judge(feedback("a")))
    with pytest.raises(NotStored, match="away"):
        asyncio.run(writer.find("income", "bob", "a"))
    database.fault = None
    assert asyncio.run(writer.judge(feedback("a"))) == Verdict.STORED


def test_while_the_database_fails_nobody_waits_for_its_answer(database, writer):
    database.fault = AWAY
    writer.add(prediction("a"))
    until(lambda: writer.recording().fault)
    database.predictions = lambda *_: time.sleep(60)
    with pytest.raises(NotStored, match="away"):
        asyncio.run(writer.find("income", "bob", "b"))


def test_feedback_that_waits_is_bounded_in_bytes(writer, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_WAITING_BYTES", OVERHEAD_BYTES)
    with pytest.raises(NotStored, match="too much"):
        asyncio.run(writer.judge(feedback("a")))


def test_a_client_that_is_gone_keeps_nobody_elses_feedback(database, writer):
    """Its event loop has ended, as that of a replica that stops."""
    loop = asyncio.new_event_loop()
    database.fault = AWAY
    task = loop.create_task(writer.judge(feedback("gone")))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    database.fault = None
    assert asyncio.run(writer.judge(feedback("a"))) == Verdict.STORED


def test_a_prediction_is_found_before_and_after_it_is_written(database, writer):
    database.fault = AWAY
    writer.add(prediction("a"))
    assert asyncio.run(writer.find("income", "bob", "a")).request_id == "a"
    database.fault = None
    until(lambda: database.written)
    until(lambda: not writer.recording().waiting)
    assert asyncio.run(writer.find("income", "bob", "a")).request_id == "a"
    assert asyncio.run(writer.find("income", "eve", "a")) is None, "it is another's"
    assert asyncio.run(writer.find("income", "bob", "b")) is None
