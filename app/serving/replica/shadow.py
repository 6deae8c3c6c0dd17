"""Shadows: variants that get a copy of the traffic, and whose answers nobody sees but the records.

The copies go through a queue that drops when it is full, so a shadow that is slow, hangs or dies costs those
who are answered nothing.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from ray.exceptions import RayError

from app.bundle.bundle import Ranking
from app.bundle.schema import Schema
from app.serving.logs import log
from app.serving.protocols import rows
from app.serving.protocols.contract import Answer, Columns
from app.serving.replica.loaded import Loaded
from app.serving.replica.workers import WorkerHandle
from app.state.records import Prediction

QUEUE, QUEUE_BYTES = 256, 8 * 2**20
"""Most copies that wait, and most JSON in them; more are dropped. In memory a copy takes some ten times its
JSON: its rows are Python objects."""
TOGETHER = 32
"""Copies that a shadow is asked about at once."""
PAUSE_S = 1.0
"""After a failure."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that was answered."""

    answered: Prediction
    columns: Columns
    size: int
    """Bytes of the recorded prediction; 0 if it is not recorded, and then its shadows are not either."""


class Shadow:
    """One of them, with its queue. To be made in an event loop."""

    def __init__(
        self,
        variant: str,
        version: str,
        remote: WorkerHandle,
        schema: Schema,
        record: Callable[[Prediction], object],
    ):
        self._variant = variant
        self.version = version
        self._remote = remote
        self._schema = schema
        self._record = record
        self._queue: asyncio.Queue[Copy] = asyncio.Queue(QUEUE)
        self._bytes = 0
        """Of the copies that wait or are being asked about."""
        self._asking = asyncio.create_task(self._ask_on())
        self.dropped = 0
        """Copies that it did not get, or did not answer."""

    def offer(self, copy: Copy) -> None:
        """Never waits."""
        if not copy.size or self._bytes + copy.size > QUEUE_BYTES or self._queue.full():
            self.dropped += 1
            return
        self._queue.put_nowait(copy)
        self._bytes += copy.size

    def close(self) -> None:
        """What still waits is dropped."""
        self._asking.cancel()

    async def _ask_on(self) -> None:
        while True:
            copies = [await self._queue.get()]
            while len(copies) < TOGETHER and not self._queue.empty():
                copies.append(self._queue.get_nowait())
            try:
                await self._ask(copies)
            except Exception as error:
                self.dropped += len(copies)
                expected = isinstance(error, TimeoutError | RayError)
                reason = str(error).splitlines()[:1]
                log.warning("the shadow %s does not answer: %s", self._variant, reason, exc_info=not expected)
                await asyncio.sleep(PAUSE_S)
            finally:
                self._bytes -= sum(copy.size for copy in copies)

    async def _ask(self, copies: list[Copy]) -> None:
        begun = time.perf_counter()
        given = await self._remote.predict(_joined([copy.columns for copy in copies]))
        seconds = time.perf_counter() - begun
        first = 0
        for copy in copies:
            last = first + len(copy.answered.rows)
            part = _part(given, first, last)
            answer = Answer(
                model=copy.answered.model,
                variant=self._variant,
                version=self.version,
                request_id=copy.answered.request_id,
                probabilities=None if isinstance(part, Ranking) else part,
                ranking=part if isinstance(part, Ranking) else None,
            )
            predictions = rows.predictions(answer, self._schema)["predictions"]
            self._record(
                replace(
                    copy.answered,
                    variant=self._variant,
                    version=self.version,
                    role="shadow",
                    answer=predictions,
                    seconds=seconds,
                )
            )
            first = last


class Shadows:
    """The shadows of a replica, one for each variant that is one."""

    def __init__(self, record: Callable[[Prediction], object] | None):
        """`record` stores a shadow's prediction; if None, nothing is recorded, and no shadow is asked."""
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
        """Send a copy of a request to every shadow. Does not wait."""
        for shadow in self._shadows.values():
            shadow.offer(copy)

    def dropped(self) -> dict[str, int]:
        """Copies that each shadow dropped or failed to answer."""
        return {name: shadow.dropped for name, shadow in self._shadows.items()}

    def close(self) -> None:
        """Stop all shadows."""
        for shadow in self._shadows.values():
            shadow.close()


def _joined(requests: list[Columns]) -> Mapping[str, np.ndarray]:
    return {name: np.concatenate([columns[name] for columns in requests]) for name in requests[0]}


def _part(given: np.ndarray | Ranking, first: int, last: int) -> np.ndarray | Ranking:
    if isinstance(given, Ranking):
        return Ranking(given.items[first:last], given.scores[first:last], given.known[first:last])
    return given[first:last]
