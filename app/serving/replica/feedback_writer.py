"""Writes feedback to the database before it is acknowledged; feedback that arrives together shares a
transaction."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import orjson

from app.serving.logs import log
from app.state import engine
from app.state.feedback import Feedback, FeedbackStatus
from app.state.records import Records

MAX_WAITING_BYTES = 64 * 2**20
"""Maximum size of the feedback that waits to be written. Further feedback is refused."""
OVERHEAD_BYTES = 500
"""Memory of a waiting feedback in addition to its JSON."""
MAX_BATCH = 2_000
"""Maximum number of feedbacks in one transaction."""

Result = FeedbackStatus | Exception


class NotStored(Exception):
    """Feedback cannot be stored now, because the database does not accept it."""


class WaitingFeedback(NamedTuple):
    """Feedback that waits to be written."""

    feedback: Feedback
    resolve: Callable[[Result], None]
    """Wakes the coroutine that waits for the result."""


class FeedbackWriter:
    """A queue of feedback. `add` is called by requests, `write` by a thread of its own."""

    def __init__(self, records: Records, per_hour: int, closing: threading.Event):
        """`per_hour` is the limit of each sender. Once `closing` is set, `write` no longer waits."""
        self._records = records
        self._per_hour = per_hour
        self._closing = closing
        self._queue: list[WaitingFeedback] = []
        self._waiting_bytes = 0
        self._changed = threading.Condition()

    async def add(self, feedback: Feedback) -> FeedbackStatus:
        """Queue feedback; returns when it is durable. Raises NotStored if it cannot be stored."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[FeedbackStatus] = loop.create_future()
        size_bytes = len(orjson.dumps(feedback.content)) + OVERHEAD_BYTES

        def resolve(result: Result) -> None:
            loop.call_soon_threadsafe(_resolve, future, result)

        with self._changed:
            if self._waiting_bytes + size_bytes > MAX_WAITING_BYTES:
                raise NotStored("too much feedback waits to be stored")
            self._waiting_bytes += size_bytes
            self._queue.append(WaitingFeedback(feedback, resolve))
            self._changed.notify()
        try:
            return await future
        finally:
            with self._changed:
                self._waiting_bytes -= size_bytes

    def write(self) -> None:
        """Wait for feedback, and write all that is in the queue."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing.is_set())
        while batch := self._next_batch():
            results = self._write_batch([waiting.feedback for waiting in batch])
            for waiting, result in zip(batch, results, strict=True):
                with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody waits
                    waiting.resolve(result)

    def wake(self) -> None:
        """Wake `write`, which returns if `closing` is set."""
        with self._changed:
            self._changed.notify()

    def _next_batch(self) -> list[WaitingFeedback]:
        with self._changed:
            batch, self._queue = self._queue[:MAX_BATCH], self._queue[MAX_BATCH:]
        return batch

    def _write_batch(self, batch: Sequence[Feedback]) -> list[Result]:
        """Write a batch. If the database accepts writes but refuses this batch, write two halves."""
        try:
            return [*self._records.add_feedback(batch, self._per_hour)]
        except Exception as error:
            if len(batch) == 1 or not self._accepts_writes():
                reason = engine.reason(error)
                log.warning("feedback cannot be stored: %s", reason, exc_info=True)
                return [NotStored(reason)] * len(batch)
        half = len(batch) // 2
        return self._write_batch(batch[:half]) + self._write_batch(batch[half:])

    def _accepts_writes(self) -> bool:
        try:
            self._records.add([])
        except Exception:
            return False
        return True


def _resolve(future: "asyncio.Future[FeedbackStatus]", result: Result) -> None:
    if future.done():
        return  # the client closed the connection
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
