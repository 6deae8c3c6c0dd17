import asyncio
import threading
import time

import pytest
from sqlalchemy.exc import DataError, OperationalError

from app.records import Feedback, Verdict
from app.serving import recorder
from app.serving.recorder import Recorder
from tests.unit.test_records import prediction


class Database:
    """Takes what is written, or is away."""

    def __init__(self):
        self.away = threading.Event()
        self.written, self.batches = [], []

    def add(self, predictions):
        self._check([p.request_id for p in predictions])
        self.written += predictions

    def judge(self, given, per_hour):
        self._check([f.request_id for f in given])
        self.batches.append(list(given))
        return [Verdict.STORED] * len(given)

    def predictions(self, model, request_ids):
        return [p for p in self.written if p.model == model and p.request_id in request_ids]

    def close(self):
        self.closed = True

    def _check(self, request_ids):
        if self.away.is_set():
            raise OperationalError("INSERT", {}, Exception("away"))
        if "never" in request_ids:
            raise DataError("INSERT", {}, Exception("cannot be stored"))


@pytest.fixture
def database():
    return Database()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(recorder, "EVERY_S", 0.01)
    monkeypatch.setattr(recorder, "RETRY_S", 0.01)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def feedback(request_id):
    return Feedback("income", request_id, {"reward": 1.0}, "bob", 0.0)


def test_predictions_are_written_behind_and_all_at_the_end(database):
    writer = Recorder(database, 10)
    writer.add(prediction("a"))
    until(lambda: len(database.written) == 1)
    for number in range(5000):
        writer.add(prediction(str(number)))
    writer.close()
    assert [p.request_id for p in database.written] == ["a", *map(str, range(5000))]
    assert writer.dropped == 0


def test_a_database_that_was_away_gets_all_later(database):
    database.away.set()
    writer = Recorder(database, 10)
    for number in range(10):
        writer.add(prediction(str(number)))
    time.sleep(0.1)
    database.away.clear()
    until(lambda: len(database.written) == 10)
    writer.close()
    assert writer.dropped == 0


def test_it_is_tried_a_last_time_before_the_end(database, monkeypatch):
    monkeypatch.setattr(recorder, "RETRY_S", 60)
    database.away.set()
    writer = Recorder(database, 10)
    writer.add(prediction("a"))
    time.sleep(0.1)  # it was tried by now, and the next time is in a minute
    database.away.clear()
    writer.close()
    assert ([p.request_id for p in database.written], writer.dropped) == (["a"], 0)


def test_what_waits_is_bounded_and_what_is_lost_is_counted(database, monkeypatch):
    monkeypatch.setattr(recorder, "MOST", 100)
    database.away.set()
    writer = Recorder(database, 10)
    for number in range(150):
        writer.add(prediction(str(number)))
    assert writer.dropped == 50
    writer.close()  # it does not hang, though the database is away
    assert (len(database.written), writer.dropped) == (0, 150)


def test_what_the_database_never_takes_keeps_nothing_else_from_it(database):
    async def say():
        given = (writer.judge(feedback(request_id)) for request_id in ("a", "never", "b"))
        return await asyncio.gather(*given, return_exceptions=True)

    writer = Recorder(database, 10)
    for request_id in ("a", "never", "b"):
        writer.add(prediction(request_id))
    first, refused, last = asyncio.run(say())
    assert (first, last) == (Verdict.STORED, Verdict.STORED)
    assert isinstance(refused, DataError)
    writer.close()
    assert [p.request_id for p in database.written] == ["a", "b"]
    assert writer.dropped == 1


def test_feedback_that_comes_together_is_written_together(database):
    async def say():
        return await asyncio.gather(*(writer.judge(feedback(str(n))) for n in range(200)))

    writer = Recorder(database, 10)
    assert asyncio.run(say()) == [Verdict.STORED] * 200
    assert len(database.batches) < 50
    writer.close()


def test_feedback_is_not_acknowledged_while_the_database_is_away(database):
    database.away.set()
    writer = Recorder(database, 10)
    with pytest.raises(OperationalError):
        asyncio.run(writer.judge(feedback("a")))
    database.away.clear()
    assert asyncio.run(writer.judge(feedback("a"))) == Verdict.STORED
    writer.close()


def test_a_prediction_is_found_before_and_after_it_is_written(database):
    writer = Recorder(database, 10)
    database.away.set()
    writer.add(prediction("a"))
    assert asyncio.run(writer.find("income", "a")).request_id == "a"
    database.away.clear()
    until(lambda: database.written)
    assert asyncio.run(writer.find("income", "a")).request_id == "a"
    assert asyncio.run(writer.find("income", "b")) is None
    writer.close()
