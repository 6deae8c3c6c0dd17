import threading
import time

import pytest

from app.serving.replica import retrying
from app.serving.replica.retrying import RetryingThread


class Step:
    """Fails while `error` is set; keeps the number of attempts."""

    def __init__(self):
        self.error = None
        self.num_attempts = 0

    def __call__(self):
        self.num_attempts += 1
        time.sleep(0.001)
        if self.error:
            raise self.error


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retrying, "RETRY_S", 0.01)


@pytest.fixture
def closing():
    return threading.Event()


@pytest.fixture
def step():
    return Step()


@pytest.fixture
def thread(step, closing):
    thread = RetryingThread(step, "a test's", closing)
    thread.start()
    yield thread
    closing.set()
    thread.join(10)
    assert not thread.is_alive()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_step_that_fails_is_retried_and_logged_once(step, thread, caplog):
    step.error = OSError("disk")
    wait_until(lambda: thread.fault == "disk")
    num_attempts = step.num_attempts
    wait_until(lambda: step.num_attempts > num_attempts + 2)
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
    step.error = None
    wait_until(lambda: thread.fault is None)


def test_the_last_step_runs_after_closing_without_the_pause(step, closing, monkeypatch):
    monkeypatch.setattr(retrying, "RETRY_S", 60)
    step.error = OSError("disk")
    thread = RetryingThread(step, "a test's", closing)
    thread.start()
    wait_until(lambda: thread.fault)
    assert step.num_attempts == 1
    closing.set()
    thread.join(10)
    assert (thread.is_alive(), step.num_attempts) == (False, 2)
