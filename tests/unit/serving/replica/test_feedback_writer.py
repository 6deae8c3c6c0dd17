import asyncio
import threading

import pytest

from app.serving.replica import feedback_writer
from app.serving.replica.feedback_writer import OVERHEAD_BYTES, FeedbackWriter, NotStored
from app.state.feedback import FeedbackStatus
from tests.fake_records import AWAY, FakeRecords, feedback


@pytest.fixture
def records():
    return FakeRecords()


@pytest.fixture
def closing():
    return threading.Event()


@pytest.fixture
def writer(records, closing):
    return FeedbackWriter(records, 10, closing)


def add_all(writer, *request_ids):
    """Add feedback on some requests, and write it once; returns the results."""

    async def add_and_write():
        tasks = [asyncio.create_task(writer.add(feedback(request_id))) for request_id in request_ids]
        await asyncio.sleep(0)  # all are in the queue
        await asyncio.to_thread(writer.write)
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(add_and_write())


def test_feedback_that_waits_is_written_in_one_batch(records, writer):
    assert add_all(writer, *map(str, range(200))) == [FeedbackStatus.STORED] * 200
    assert [len(batch) for batch in records.feedback_batches] == [200]


def test_feedback_is_refused_while_the_database_is_away(records, writer):
    records.fault = AWAY
    results = add_all(writer, "a", "b")
    assert [type(result) for result in results] == [NotStored, NotStored]
    assert str(results[0]) == "away"
    records.fault = None
    assert add_all(writer, "a") == [FeedbackStatus.STORED]


@pytest.mark.parametrize("bad", ["never", "odd"])
def test_only_the_feedback_that_the_database_refuses_is_not_stored(records, writer, bad):
    first, refused, last = add_all(writer, "a", bad, "b")
    assert (first, last) == (FeedbackStatus.STORED, FeedbackStatus.STORED)
    assert isinstance(refused, NotStored)


def test_the_queue_is_bounded_in_bytes(writer, monkeypatch):
    monkeypatch.setattr(feedback_writer, "MAX_WAITING_BYTES", OVERHEAD_BYTES)
    with pytest.raises(NotStored, match="too much"):
        asyncio.run(writer.add(feedback("a")))


def test_the_feedback_of_a_closed_event_loop_does_not_affect_others(writer):
    """A replica stops while feedback waits."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(writer.add(feedback("gone")))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    assert add_all(writer, "a") == [FeedbackStatus.STORED]


def test_write_waits_for_feedback_until_the_writer_is_closing(writer, closing):
    thread = threading.Thread(target=writer.write)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    closing.set()
    writer.wake()
    thread.join(10)
    assert not thread.is_alive()
