"""Shadows: variants that predict copies of requests. Their predictions are only recorded.

Each shadow has a queue that drops copies when it is full, so that a shadow which is slow, hangs or dies does
not delay the answers to clients.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from ray.exceptions import RayError

from app.bundle.bundle import Ranking
from app.bundle.schema import Schema
from app.serving.logs import log
from app.serving.protocols import rows
from app.serving.protocols.contract import Answer, Columns
from app.serving.replica.loaded import Loaded
from app.serving.replica.workers import WorkerHandle, concatenate_columns
from app.state.records import Prediction

MAX_COPIES = 256
"""Maximum number of copies in the queue of a shadow."""
MAX_QUEUE_BYTES = 8 * 2**20
"""Maximum size of the copies in a queue, as JSON. In memory, a copy takes about ten times as much, because
its rows are Python objects."""
MAX_BATCH = 32
"""Maximum number of copies that are predicted together."""
PAUSE_S = 1.0
"""Pause after a prediction that failed."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a request that has been answered, for the shadows."""

    prediction: Prediction
    """Prediction that the client got."""
    columns: Columns
    """Columns of the request; every array has the shape (rows,)."""
    size_bytes: int
    """Size of the recorded prediction; 0 if it is not recorded: then no shadow predicts the request."""


class Shadow:
    """A shadow with its queue. Must be created in an event loop."""

    def __init__(
        self,
        variant: str,
        version: str,
        workers: WorkerHandle,
        schema: Schema,
        record: Callable[[Prediction], object],
    ):
        self._variant = variant
        self.version = version
        self._workers = workers
        self._schema = schema
        self._record = record
        self._queue: asyncio.Queue[Copy] = asyncio.Queue(MAX_COPIES)
        self._size_bytes = 0
        """Size of the copies in the queue and of those that are being predicted."""
        self._predicting = asyncio.create_task(self._predict_forever())
        self.num_dropped = 0
        """Number of copies that were dropped, or whose prediction failed."""

    def offer(self, copy: Copy) -> None:
        """Queue a copy, or drop it. Does not wait."""
        if not copy.size_bytes or self._size_bytes + copy.size_bytes > MAX_QUEUE_BYTES or self._queue.full():
            self.num_dropped += 1
            return
        self._queue.put_nowait(copy)
        self._size_bytes += copy.size_bytes

    def close(self) -> None:
        """Stop predicting. Copies in the queue are discarded."""
        self._predicting.cancel()

    async def _predict_forever(self) -> None:
        while True:
            copies = [await self._queue.get()]
            while len(copies) < MAX_BATCH and not self._queue.empty():
                copies.append(self._queue.get_nowait())
            try:
                await self._predict(copies)
            except Exception as error:
                self.num_dropped += len(copies)
                is_expected = isinstance(error, TimeoutError | RayError)
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                log.warning(
                    "the shadow %s does not answer: %s", self._variant, reason, exc_info=not is_expected
                )
                await asyncio.sleep(PAUSE_S)
            finally:
                self._size_bytes -= sum(copy.size_bytes for copy in copies)

    async def _predict(self, copies: list[Copy]) -> None:
        """Predict some copies together, and record a prediction for each."""
        started = time.perf_counter()
        output = await self._workers.predict(concatenate_columns([copy.columns for copy in copies]))
        seconds = time.perf_counter() - started
        first = 0
        for copy in copies:
            last = first + len(copy.prediction.rows)
            part = _slice(output, first, last)
            answer = Answer(
                model=copy.prediction.model,
                variant=self._variant,
                version=self.version,
                request_id=copy.prediction.request_id,
                probabilities=None if isinstance(part, Ranking) else part,
                ranking=part if isinstance(part, Ranking) else None,
            )
            self._record(
                replace(
                    copy.prediction,
                    variant=self._variant,
                    version=self.version,
                    role="shadow",
                    answer=rows.predictions(answer, self._schema)["predictions"],
                    seconds=seconds,
                )
            )
            first = last


class Shadows:
    """The shadows of an endpoint in a replica."""

    def __init__(self, record: Callable[[Prediction], object] | None):
        """`record` records a prediction. If it is None, the endpoint keeps no records, and no shadow runs."""
        self._record = record
        self._shadows: dict[str, Shadow] = {}

    def update(self, loaded: Loaded) -> None:
        """Start the shadows of a traffic, and stop those that it does not have. Needs an event loop."""
        previous, self._shadows = self._shadows, {}
        if self._record is None:
            return
        for name, variant in loaded.traffic.variants.items():
            if not variant.shadow:
                continue
            shadow = previous.get(name)
            if shadow is None or shadow.version != variant.version:
                shadow = Shadow(name, variant.version, loaded.workers[name], loaded.schema, self._record)
            self._shadows[name] = shadow
        for shadow in previous.values():
            if shadow not in self._shadows.values():
                shadow.close()

    def offer(self, copy: Copy) -> None:
        """Offer a copy of a request to every shadow. Does not wait."""
        for shadow in self._shadows.values():
            shadow.offer(copy)

    def dropped(self) -> dict[str, int]:
        """Number of copies that each shadow dropped or failed to predict."""
        return {name: shadow.num_dropped for name, shadow in self._shadows.items()}

    def close(self) -> None:
        """Stop all shadows."""
        for shadow in self._shadows.values():
            shadow.close()


def _slice(output: np.ndarray | Ranking, first: int, last: int) -> np.ndarray | Ranking:
    """The rows from `first` up to `last`, exclusive."""
    if isinstance(output, Ranking):
        return Ranking(output.items[first:last], output.scores[first:last], output.known[first:last])
    return output[first:last]
