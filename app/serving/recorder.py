"""Writing behind the answers: predictions in batches, and feedback before it is acknowledged."""

import asyncio
import threading
from collections.abc import Callable, Sequence

from sqlalchemy.exc import DataError, DBAPIError

from app.records import Feedback, Prediction, Records, Verdict
from app.serving.logs import log

EVERY_S = 0.5
"""How often predictions are written: what a replica that is killed loses of them, besides a write."""
MOST = 50_000
"""Predictions that wait for a database that is away; later ones are dropped, and counted."""
BATCH = 2_000
RETRY_S = 1.0


class Recorder:
    """Two threads of a replica: one for predictions, one for feedback."""

    def __init__(self, records: Records, feedback_per_hour: int):
        self._records = records
        self._per_hour = feedback_per_hour
        self._predictions: list[Prediction] = []
        self._feedback: list[tuple[Feedback, Callable[[Verdict | Exception], None]]] = []
        self._said = threading.Condition()
        self._closing = threading.Event()
        self.dropped = 0
        """Predictions that were not written: the database was away for too long, or would not take them."""
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True)
            for target in (self._write_predictions, self._write_feedback)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, prediction: Prediction) -> None:
        """Have a prediction written. Never waits."""
        if len(self._predictions) < MOST:
            self._predictions.append(prediction)
        else:
            self.dropped += 1

    async def find(self, model: str, request_id: str) -> Prediction | None:
        """The prediction that was made for a request, if it is there."""
        for waiting in reversed(self._predictions):
            if waiting.request_id == request_id:
                return waiting
        found = await asyncio.to_thread(self._records.predictions, model, [request_id])
        return found[0] if found else None

    async def judge(self, feedback: Feedback) -> Verdict:
        """Have feedback written; returns when it is durable. Raises DBAPIError if the database is away.

        What comes at the same time shares one transaction.
        """
        loop = asyncio.get_running_loop()
        judged: asyncio.Future[Verdict] = loop.create_future()

        def settle(result: Verdict | Exception) -> None:
            loop.call_soon_threadsafe(_settle, judged, result)

        with self._said:
            self._feedback.append((feedback, settle))
            self._said.notify()
        return await judged

    def close(self) -> None:
        """Until all is written, or the database does not take it."""
        self._closing.set()
        with self._said:
            self._said.notify()
        for thread in self._threads:
            thread.join()
        self._records.close()

    def _write_predictions(self) -> None:
        while not self._closing.wait(EVERY_S) or self._predictions:
            while batch := self._predictions[:BATCH]:
                try:
                    self._add(batch)
                except DBAPIError as error:
                    log.warning("predictions cannot be written: %s", error.orig)
                    if self._closing.is_set():
                        self.dropped += len(self._predictions)
                        return
                    # Whoever closes has it tried a last time.
                    self._closing.wait(RETRY_S)
                    continue
                # Nobody else takes any out, and what `add` appends meanwhile comes after these.
                del self._predictions[: len(batch)]

    def _add(self, batch: Sequence[Prediction]) -> None:
        """Raises DBAPIError if the database is away."""
        try:
            self._records.add(batch)
        except DataError as error:
            # One that the database will never take is not to keep the others from it.
            if len(batch) > 1:
                for prediction in batch:
                    self._add([prediction])
            else:
                log.error("the prediction of %s cannot be written: %s", batch[0].request_id, error.orig)
                self.dropped += 1

    def _write_feedback(self) -> None:
        while True:
            with self._said:
                self._said.wait_for(lambda: self._feedback or self._closing.is_set())
                batch, self._feedback = self._feedback[:BATCH], self._feedback[BATCH:]
            if not batch:
                return
            verdicts = self._judged([feedback for feedback, _ in batch])
            for (_, settle), verdict in zip(batch, verdicts, strict=True):
                settle(verdict)

    def _judged(self, batch: Sequence[Feedback]) -> list[Verdict | Exception]:
        try:
            return [*self._records.judge(batch, self._per_hour)]
        except DataError as error:
            # As above.
            return [error] if len(batch) == 1 else [self._judged([each])[0] for each in batch]
        except Exception as error:
            return [error] * len(batch)


def _settle(judged: "asyncio.Future[Verdict]", result: Verdict | Exception) -> None:
    if judged.done():
        return  # the client has gone
    if isinstance(result, Exception):
        judged.set_exception(result)
    else:
        judged.set_result(result)
