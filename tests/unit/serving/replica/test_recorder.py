import asyncio
import threading
import time

import pytest

from app.serving.replica import recorder as recorders
from app.serving.replica import retrying
from app.serving.replica.feedback_writer import NotStored
from app.serving.replica.prediction_writer import CLOSED
from app.serving.replica.recorder import Recorder
from app.state.feedback import FeedbackStatus
from app.state.records import Records
from tests.fake_records import AWAY, FAULTS, FakeRecords, feedback
from tests.records import prediction


@pytest.fixture
def records():
    return FakeRecords()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(recorders, "WRITE_INTERVAL_S", 0.01)
    monkeypatch.setattr(retrying, "RETRY_S", 0.01)


@pytest.fixture
def recorder(records):
    recorder = Recorder(records, 10)
    yield recorder
    recorder.close()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_predictions_are_written_in_the_background_and_the_rest_at_the_end(records):
    recorder = Recorder(records, 10)
    recorder.add(prediction("a"))
    wait_until(lambda: len(records.request_ids) == 1)
    for number in range(5000):
        recorder.add(prediction(str(number)))
    recorder.close()
    assert records.request_ids == ["a", *map(str, range(5000))]
    assert not recorder.status().dropped
    assert records.is_closed


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_writes_are_retried_after_any_fault_and_nothing_is_lost(records, recorder, fault):
    records.fault = fault
    for number in range(10):
        recorder.add(prediction(str(number)))
    wait_until(lambda: recorder.status().fault)
    assert recorder.status().num_waiting == 10
    records.fault = None
    wait_until(lambda: len(records.request_ids) == 10)
    wait_until(lambda: recorder.status().fault is None)
    assert (recorder.status().num_waiting, recorder.status().waiting_bytes) == (0, 0)
    assert not recorder.status().dropped
    recorder.add(prediction("later"))
    wait_until(lambda: records.request_ids[-1] == "later")


def test_close_does_not_wait_for_a_database_that_hangs(records, monkeypatch):
    monkeypatch.setattr(recorders, "CLOSE_TIMEOUT_S", 0.05)
    released = threading.Event()
    monkeypatch.setattr(records, "add", lambda encoded: released.wait(30))
    recorder = Recorder(records, 10)
    recorder.add(prediction("a"))
    recorder.close()
    assert recorder.status().dropped == {CLOSED: 1}
    released.set()


def test_close_returns_while_the_database_is_away_and_counts_the_lost_predictions(records):
    records.fault = AWAY
    recorder = Recorder(records, 10)
    for number in range(5):
        recorder.add(prediction(str(number)))
    recorder.close()
    assert (records.request_ids, recorder.status().dropped) == ([], {CLOSED: 5})


def test_a_locked_database_gets_everything_later(monkeypatch):
    monkeypatch.setattr("app.state.engine.STATEMENT_TIMEOUT_S", 0.05)
    records, other = Records(), Records()
    with other._database.begin() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        recorder = Recorder(records, 10)
        recorder.add(prediction("a"))
        wait_until(lambda: recorder.status().fault)
        assert "locked" in recorder.status().fault
        with pytest.raises(NotStored, match="locked"):
            asyncio.run(recorder.add_feedback(feedback("a")))
    wait_until(lambda: not recorder.status().num_waiting)
    recorder.close()
    assert [p.request_id for p in other.predictions("income")] == ["a"]
    other.close()


def test_simultaneous_feedback_shares_transactions(records, recorder):
    async def add_feedback():
        return await asyncio.gather(*(recorder.add_feedback(feedback(str(n))) for n in range(200)))

    assert asyncio.run(add_feedback()) == [FeedbackStatus.STORED] * 200
    assert len(records.feedback_batches) < 50


def test_feedback_is_not_acknowledged_while_the_database_is_away(records, recorder):
    records.fault = AWAY
    with pytest.raises(NotStored, match="away"):
        asyncio.run(recorder.add_feedback(feedback("a")))
    with pytest.raises(NotStored, match="away"):
        asyncio.run(recorder.find("income", "bob", "a"))
    records.fault = None
    assert asyncio.run(recorder.add_feedback(feedback("a"))) == FeedbackStatus.STORED


def test_lookups_fail_at_once_while_the_database_is_away(records, recorder):
    records.fault = AWAY
    recorder.add(prediction("a"))
    wait_until(lambda: recorder.status().fault)
    records.predictions = lambda *_: time.sleep(60)
    with pytest.raises(NotStored, match="away"):
        asyncio.run(recorder.find("income", "bob", "b"))


def test_a_prediction_is_found_before_and_after_it_is_written(records, recorder):
    records.fault = AWAY
    recorder.add(prediction("a"))
    assert asyncio.run(recorder.find("income", "bob", "a")).request_id == "a"
    records.fault = None
    wait_until(lambda: records.request_ids)
    wait_until(lambda: not recorder.status().num_waiting)
    assert asyncio.run(recorder.find("income", "bob", "a")).request_id == "a"
    assert asyncio.run(recorder.find("income", "eve", "a")) is None, "another principal's"
    assert asyncio.run(recorder.find("income", "bob", "b")) is None
