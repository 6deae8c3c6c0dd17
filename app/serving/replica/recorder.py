"""Writing behind the answers: predictions in batches, and feedback before it is acknowledged."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import orjson

from app.serving.logs import log
from app.state.records import Feedback, Prediction, Records, Verdict, decode, encode

EVERY_S = 0.5
"""How often predictions are written: a replica that is killed loses those of this time, and of one write."""
MAX_WAITING_BYTES = 64 * 2**20
"""Most that waits for a database that is away; later predictions are dropped, and counted."""
OVERHEAD_BYTES = 500
"""What a prediction takes in memory besides its JSON."""
BATCH, BATCH_BYTES = 2_000, 8 * 2**20
"""Most that is written in one transaction."""
RETRY_S, MAX_RETRY_S = 1.0, 30.0
"""First and longest pause after a write that failed."""
NUM_FINDERS = 4
"""Threads that look up predictions for feedback."""
CLOSE_S = 12.0
"""How long `close` waits for what is left. Serve kills a replica that takes 20 s to stop."""

FULL, REFUSED, REPEATED, CLOSED = "buffer full", "refused", "request id repeated", "database away at the end"
"""Why a prediction was not recorded. REFUSED: a value that JSON or the database does not take."""


class NotStored(Exception):
    """Feedback that is not durable, because the database does not take it now."""


@dataclass(frozen=True)
class Recording:
    """How a replica's recording does."""

    dropped: dict[str, int]
    """Predictions that were not recorded, by reason."""
    waiting: int
    waiting_bytes: int
    fault: str | None
    """Why nothing can be written at the moment."""


class Recorder:
    """Two threads of a replica: one for predictions, one for feedback."""

    def __init__(self, records: Records, feedback_per_hour: int):
        self._records = records
        self._per_hour = feedback_per_hour
        self._changing = threading.Lock()
        self._waiting: dict[tuple[str, str, str], bytes] = {}
        """Predictions to be written, by principal, request id and shadow; the oldest first."""
        self._waiting_bytes = 0
        self._dropped: Counter[str] = Counter()
        self._faults: dict[str, str] = {}
        """What each thread failed with last, while it fails."""
        self._feedback: list[tuple[Feedback, Callable[[Verdict | Exception], None]]] = []
        self._feedback_bytes = 0
        self._said = threading.Condition()
        self._closing = threading.Event()
        # Threads of their own: in the event loop's, all else would wait behind a database that hangs.
        self._finders = ThreadPoolExecutor(NUM_FINDERS, "find")
        self._threads = [
            threading.Thread(target=self._run, args=(step,), name=step.__name__, daemon=True)
            for step in (self._write_predictions, self._write_feedback)
        ]
        for thread in self._threads:
            thread.start()

    def recording(self) -> Recording:
        with self._changing:
            fault = next(iter(self._faults.values()), None)
            return Recording(dict(self._dropped), len(self._waiting), self._waiting_bytes, fault)

    def add(self, prediction: Prediction) -> int:
        """Have a prediction written. Never waits, never raises.

        Returns its size in bytes, or 0 if it was dropped.
        """
        try:
            encoded = encode(prediction)
        except (TypeError, ValueError) as error:  # such as half of a surrogate pair
            log.error("the prediction of %s cannot be recorded: %s", prediction.request_id, error)
            self._drop(REFUSED)
            return 0
        key = (prediction.principal, prediction.request_id, prediction.shadow)
        with self._changing:
            is_known = key in self._waiting
            if is_known or self._waiting_bytes + len(encoded) + OVERHEAD_BYTES > MAX_WAITING_BYTES:
                self._dropped[REPEATED if is_known else FULL] += 1
                return 0
            self._waiting[key] = encoded
            self._waiting_bytes += len(encoded) + OVERHEAD_BYTES
        return len(encoded)

    async def find(self, model: str, principal: str, request_id: str) -> Prediction | None:
        """The prediction that a principal got for a request, if there is one.

        Raises NotStored if the database is away.
        """
        if (waiting := self._waiting.get((principal, request_id, ""))) is not None:
            return decode(waiting)
        if (fault := self.recording().fault) is not None:
            raise NotStored(fault)  # at once: nobody else waits behind those who ask a database that hangs
        look = partial(self._records.predictions, model, [request_id], principal)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._finders, look)
        except Exception as error:
            raise NotStored(_reason(error)) from error
        return next((prediction for prediction in found if not prediction.shadow), None)

    async def judge(self, feedback: Feedback) -> Verdict:
        """Have feedback written; returns when it is durable. Raises NotStored if it cannot be.

        What comes at the same time shares one transaction.
        """
        loop = asyncio.get_running_loop()
        judged: asyncio.Future[Verdict] = loop.create_future()
        size = len(orjson.dumps(feedback.said)) + OVERHEAD_BYTES

        def settle(result: Verdict | Exception) -> None:
            loop.call_soon_threadsafe(_settle, judged, result)

        with self._said:
            if self._feedback_bytes + size > MAX_WAITING_BYTES:
                raise NotStored("too much feedback waits to be stored")
            self._feedback_bytes += size
            self._feedback.append((feedback, settle))
            self._said.notify()
        try:
            return await judged
        finally:
            with self._said:
                self._feedback_bytes -= size

    def close(self) -> None:
        """Write what is left, as far as the database takes it within CLOSE_S."""
        self._closing.set()
        with self._said:
            self._said.notify()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changing:
            lost = len(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
        self._drop(CLOSED, lost)
        if lost:
            log.error("%d predictions are lost: the database did not take them at the end", lost)
        self._finders.shutdown(wait=False, cancel_futures=True)
        self._records.close()

    def _run(self, step: Callable[[], None]) -> None:
        """Repeat a step until the end, whatever it raises."""
        pause_s = RETRY_S
        while True:
            is_last = self._closing.is_set()
            try:
                step()
                with self._changing:
                    self._faults.pop(step.__name__, None)
                pause_s = RETRY_S
            except Exception as error:
                if step.__name__ not in self._faults:
                    log.exception("records cannot be written; they wait, and it is tried again")
                with self._changing:
                    self._faults[step.__name__] = _reason(error)
                if is_last:
                    return
                # Woken by `close`, which has it tried a last time.
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)
            if is_last:
                return

    def _write_predictions(self) -> None:
        """Write all that waits. Raises what the database raises while it takes nothing."""
        self._closing.wait(EVERY_S)
        while batch := self._batch():
            self._write(batch)

    def _batch(self) -> list[tuple[tuple[str, str, str], bytes]]:
        with self._changing:
            first = list(islice(self._waiting.items(), BATCH))
        size = 0
        for place, (_, encoded) in enumerate(first):
            size += len(encoded)
            if place and size > BATCH_BYTES:
                return first[:place]
        return first

    def _write(self, batch: Sequence[tuple[tuple[str, str, str], bytes]], attempts: int = 2) -> None:
        """Write a batch; a prediction that the database does not take, though it takes writes, is dropped.

        Raises what the database raises if it takes no writes.
        """
        try:
            added = self._records.add([encoded for _, encoded in batch])
        except Exception as error:
            self._records.add([])  # the database's fault if this raises, and the batch's if not
            if len(batch) > 1:
                half = len(batch) // 2
                self._write(batch[:half])
                self._write(batch[half:])
            elif attempts > 1:
                self._write(batch, attempts - 1)  # the database may have come back in between
            else:
                log.error("the prediction of %s cannot be recorded: %s", batch[0][0][1], _reason(error))
                self._drop(REFUSED)
                self._forget(batch)
            return
        self._drop(REPEATED, len(batch) - added)
        self._forget(batch)

    def _forget(self, batch: Sequence[tuple[tuple[str, str, str], bytes]]) -> None:
        with self._changing:
            for key, encoded in batch:
                if self._waiting.pop(key, None) is not None:
                    self._waiting_bytes -= len(encoded) + OVERHEAD_BYTES

    def _drop(self, reason: str, count: int = 1) -> None:
        if count > 0:
            with self._changing:
                self._dropped[reason] += count

    def _write_feedback(self) -> None:
        with self._said:
            self._said.wait_for(lambda: self._feedback or self._closing.is_set())
            batch, self._feedback = self._feedback[:BATCH], self._feedback[BATCH:]
        while batch:
            verdicts = self._judged([feedback for feedback, _ in batch])
            for (_, settle), verdict in zip(batch, verdicts, strict=True):
                with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
                    settle(verdict)
            with self._said:
                batch, self._feedback = self._feedback[:BATCH], self._feedback[BATCH:]

    def _judged(self, batch: Sequence[Feedback]) -> list[Verdict | Exception]:
        try:
            return [*self._records.judge(batch, self._per_hour)]
        except Exception as error:
            if len(batch) == 1 or not self._takes_writes():
                log.warning("feedback cannot be stored: %s", _reason(error))
                return [NotStored(_reason(error))] * len(batch)
        half = len(batch) // 2
        return self._judged(batch[:half]) + self._judged(batch[half:])

    def _takes_writes(self) -> bool:
        try:
            self._records.add([])
        except Exception:
            return False
        return True


def _reason(error: BaseException) -> str:
    """The first line of an error, without SQLAlchemy's wrapping."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _settle(judged: "asyncio.Future[Verdict]", result: Verdict | Exception) -> None:
    if judged.done():
        return  # the client has gone
    if isinstance(result, Exception):
        judged.set_exception(result)
    else:
        judged.set_result(result)
