"""Records predictions and feedback of a replica, in threads of its own."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from app.serving.logs import log
from app.serving.replica.feedback_writer import FeedbackWriter, NotStored
from app.serving.replica.prediction_writer import PredictionWriter
from app.serving.replica.retrying import RetryingThread
from app.state import engine
from app.state.feedback import Feedback, FeedbackStatus
from app.state.records import Prediction, Records

WRITE_INTERVAL_S = 0.5
"""Pause between two writes of predictions. A replica that is killed loses the predictions of this pause and
of the write in progress."""
NUM_LOOKUP_THREADS = 4
"""Number of threads that look up the predictions of feedback."""
CLOSE_TIMEOUT_S = 12.0
"""Time for `close` to write the records that wait. Serve kills a replica that takes 20 s to stop."""


@dataclass(frozen=True)
class RecorderStatus:
    """State of a recorder."""

    dropped: dict[str, int]
    """Number of predictions that were not recorded, by reason."""
    num_waiting: int
    """Number of predictions that wait to be written."""
    waiting_bytes: int
    fault: str | None
    """Reason why nothing can be written now."""


class Recorder:
    """One thread writes predictions, another writes feedback, and some look up predictions.

    None of these threads runs the event loop, which a database that hangs would block.
    """

    def __init__(self, records: Records, feedback_per_hour: int):
        self._records = records
        self._closing = threading.Event()
        self._predictions = PredictionWriter(records)
        self._feedback = FeedbackWriter(records, feedback_per_hour, self._closing)
        self._lookups = ThreadPoolExecutor(NUM_LOOKUP_THREADS, "lookup")
        self._threads = [
            RetryingThread(self._write_predictions, "write predictions", self._closing),
            RetryingThread(self._feedback.write, "write feedback", self._closing),
        ]
        for thread in self._threads:
            thread.start()

    def status(self) -> RecorderStatus:
        """State of the recorder now."""
        predictions = self._predictions
        return RecorderStatus(
            dropped=predictions.dropped,
            num_waiting=predictions.num_waiting,
            waiting_bytes=predictions.waiting_bytes,
            fault=self._fault(),
        )

    def add(self, prediction: Prediction) -> int:
        """Buffer a prediction to be written; returns its size in bytes, or 0 if it is dropped.

        Does not wait or raise.
        """
        return self._predictions.add(prediction)

    async def find(self, model: str, principal: str, request_id: str) -> Prediction | None:
        """The prediction that a principal got for a request; None if there is none.

        Raises NotStored if the database does not answer.
        """
        if (waiting := self._predictions.find(principal, request_id)) is not None:
            return waiting
        if (fault := self._fault()) is not None:
            raise NotStored(fault)  # without a lookup: a database that hangs would block the threads
        look_up = partial(self._records.predictions, model, [request_id], principal)
        try:
            predictions = await asyncio.get_running_loop().run_in_executor(self._lookups, look_up)
        except Exception as error:
            raise NotStored(engine.reason(error)) from error
        return next((prediction for prediction in predictions if not prediction.shadow), None)

    async def add_feedback(self, feedback: Feedback) -> FeedbackStatus:
        """Write feedback; returns when it is durable. Raises NotStored if it cannot be stored."""
        return await self._feedback.add(feedback)

    def close(self) -> None:
        """Write the records that wait, for at most CLOSE_TIMEOUT_S; drop predictions that still wait then."""
        self._closing.set()
        self._feedback.wake()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if num_lost := self._predictions.drop_waiting():
            log.error(
                "%d predictions are lost: the database did not accept them before the replica stopped",
                num_lost,
            )
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._records.close()

    def _write_predictions(self) -> None:
        self._closing.wait(WRITE_INTERVAL_S)
        self._predictions.write()

    def _fault(self) -> str | None:
        return next((thread.fault for thread in self._threads if thread.fault is not None), None)
