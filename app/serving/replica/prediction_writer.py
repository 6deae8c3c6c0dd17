"""Writes predictions to the database in batches, after their answers are sent."""

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from app.serving.logs import log
from app.state import engine
from app.state.records import Prediction, Records, decode, encode

MAX_WAITING_BYTES = 64 * 2**20
"""Maximum size of the predictions that wait to be written. Further ones are dropped and counted."""
OVERHEAD_BYTES = 500
"""Memory of a waiting prediction in addition to its JSON."""
MAX_BATCH = 2_000
"""Maximum number of predictions in one transaction."""
MAX_BATCH_BYTES = 8 * 2**20
"""Maximum size of the predictions in one transaction. A larger prediction has a transaction of its own."""

# Reasons why a prediction is dropped.
FULL = "buffer full"
REFUSED = "refused"
"""The prediction has a value that JSON or the database does not accept."""
REPEATED = "request id repeated"
CLOSED = "database unavailable at shutdown"


class PredictionKey(NamedTuple):
    """The key of a prediction among all predictions of an endpoint."""

    principal: str
    request_id: str
    shadow: str
    """Name of the shadow; empty for the answer that the client got."""


Batch = Sequence[tuple[PredictionKey, bytes]]
"""Encoded predictions with their keys."""


class PredictionWriter:
    """A buffer of predictions. `add` is called by requests, `write` by a thread of its own."""

    def __init__(self, records: Records):
        self._records = records
        self._lock = threading.Lock()
        self._waiting: dict[PredictionKey, bytes] = {}
        """Encoded predictions that wait to be written, the oldest first."""
        self._waiting_bytes = 0
        self._dropped: Counter[str] = Counter()

    @property
    def dropped(self) -> dict[str, int]:
        """Number of predictions that were not recorded, by reason."""
        with self._lock:
            return dict(self._dropped)

    @property
    def num_waiting(self) -> int:
        """Number of predictions that wait to be written."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """Memory of the predictions that wait to be written."""
        return self._waiting_bytes

    def add(self, prediction: Prediction) -> int:
        """Buffer a prediction; returns its size in bytes, or 0 if it is dropped. Does not wait or raise."""
        try:
            encoded = encode(prediction)
        except (TypeError, ValueError) as error:  # such as half of a surrogate pair
            log.error("the prediction of %s cannot be recorded: %s", prediction.request_id, error)
            self._drop(REFUSED)
            return 0
        key = PredictionKey(prediction.principal, prediction.request_id, prediction.shadow)
        with self._lock:
            is_repeated = key in self._waiting
            if is_repeated or self._waiting_bytes + len(encoded) + OVERHEAD_BYTES > MAX_WAITING_BYTES:
                self._dropped[REPEATED if is_repeated else FULL] += 1
                return 0
            self._waiting[key] = encoded
            self._waiting_bytes += len(encoded) + OVERHEAD_BYTES
        return len(encoded)

    def find(self, principal: str, request_id: str) -> Prediction | None:
        """The waiting prediction that a principal got for a request; None if there is none."""
        encoded = self._waiting.get(PredictionKey(principal, request_id, ""))
        return None if encoded is None else decode(encoded)

    def write(self) -> None:
        """Write all waiting predictions. If the database accepts no writes, its exception is raised."""
        while batch := self._next_batch():
            self._write_batch(batch)

    def drop_waiting(self) -> int:
        """Drop the predictions that still wait; returns their number."""
        with self._lock:
            num_waiting = len(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
        self._drop(CLOSED, num_waiting)
        return num_waiting

    def _next_batch(self) -> Batch:
        with self._lock:
            oldest = list(islice(self._waiting.items(), MAX_BATCH))
        size_bytes = 0
        for index, (_, encoded) in enumerate(oldest):
            size_bytes += len(encoded)
            if index and size_bytes > MAX_BATCH_BYTES:
                return oldest[:index]
        return oldest

    def _write_batch(self, batch: Batch, num_attempts: int = 2) -> None:
        """Write a batch. A prediction that the database refuses, although it accepts writes, is dropped."""
        try:
            num_added = self._records.add([encoded for _, encoded in batch])
        except Exception as error:
            self._records.add([])  # raises if the database accepts no writes; otherwise the batch is at fault
            if len(batch) > 1:
                half = len(batch) // 2
                self._write_batch(batch[:half])
                self._write_batch(batch[half:])
            elif num_attempts > 1:
                self._write_batch(batch, num_attempts - 1)  # the database may have come back in between
            else:
                request_id = batch[0][0].request_id
                reason = engine.reason(error)
                log.error("the prediction of %s cannot be recorded: %s", request_id, reason, exc_info=True)
                self._drop(REFUSED)
                self._remove(batch)
            return
        self._drop(REPEATED, len(batch) - num_added)
        self._remove(batch)

    def _remove(self, batch: Batch) -> None:
        with self._lock:
            for key, encoded in batch:
                if self._waiting.pop(key, None) is not None:
                    self._waiting_bytes -= len(encoded) + OVERHEAD_BYTES

    def _drop(self, reason: str, count: int = 1) -> None:
        if count > 0:
            with self._lock:
                self._dropped[reason] += count
