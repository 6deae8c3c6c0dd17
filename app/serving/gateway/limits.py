"""How many requests a principal has sent to a model, over all replicas of its endpoint.

A replica borrows a few requests of a principal at a time from the one process that counts them all, so the
limit holds exactly however the requests are spread, and a request seldom waits for the count.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from app.serving.logs import log

ROOT = "Raylway"
"""The application that counts; a model's name, which its application has, has no capital."""
LEASE_S = 0.1
"""So much of a principal's rate is borrowed at once."""
BURST_S = 1.0
"""So much of it may come at once."""
FORGET_S = 60.0
ALONE_S = 5.0
"""How long a replica counts for itself after the one that counts for all has not answered."""


@dataclass
class _Bucket:
    tokens: float
    at: float


class Buckets:
    """The count: a token bucket for each model and principal (Turner, "New directions in
    communications", 1986)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._swept = clock()

    def borrow(self, model: str, principal: str, per_s: float, wanted: int) -> tuple[int, float]:
        """Up to `wanted` requests, and if there are none: in how many seconds there is one."""
        now, most = self._clock(), max(1.0, per_s * BURST_S)
        bucket = self._buckets.setdefault((model, principal), _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + (now - bucket.at) * per_s)
        bucket.at = now
        given = min(wanted, math.floor(bucket.tokens))
        bucket.tokens -= given
        if now - self._swept > FORGET_S:
            self._buckets = {key: b for key, b in self._buckets.items() if now - b.at < FORGET_S}
            self._swept = now
        return given, 0.0 if given else (1 - bucket.tokens) / per_s


Borrow = Callable[[str, str, float, int], Awaitable[tuple[int, float]]]


class Limiter:
    """A replica's part: what it has borrowed and not used."""

    def __init__(self, model: str, per_s: float, borrow: Borrow, clock: Callable[[], float] = time.monotonic):
        """`borrow` asks the one that counts, as `Buckets.borrow` answers."""
        self._model = model
        self._per_s = per_s
        self._borrow = borrow
        self._clock = clock
        self._borrowed: dict[str, tuple[int, float]] = {}
        """How many are left of each principal, and until when they are good."""
        self._none_until: dict[str, float] = {}

    async def wait_s(self, principal: str) -> float:
        """0 if a request of theirs may be answered; else in how many seconds there may be another."""
        now = self._clock()
        left, until = self._borrowed.get(principal, (0, 0.0))
        if left and now < until:
            self._borrowed[principal] = (left - 1, until)
            return 0.0
        if now < (soonest := self._none_until.get(principal, 0.0)):
            return soonest - now  # told without asking: those who ask too much are not to cost much
        lease = max(1, round(self._per_s * LEASE_S))
        given, wait_s = await self._borrow(self._model, principal, self._per_s, lease)
        now = self._clock()
        if len(self._borrowed) + len(self._none_until) > 100_000:
            self._borrowed.clear()
            self._none_until.clear()
        if not given:
            # Not for each drop anew: what gathers meanwhile is borrowed together.
            self._none_until[principal] = now + max(wait_s, LEASE_S)
            return wait_s
        left, until = self._borrowed.get(principal, (0, 0.0))
        self._borrowed[principal] = (given - 1 + (left if now < until else 0), now + 1.0)
        return 0.0


class Counter:
    """The count of all replicas' requests, kept by `app.serving.control.root`.

    While it does not answer, each replica counts for itself and asks again after ALONE_S: a count that hangs
    delays one request.
    """

    def __init__(self, ask: Borrow, clock: Callable[[], float] = time.monotonic):
        """`ask` may raise TimeoutError or RayError."""
        self._ask = ask
        self._clock = clock
        self._alone = Buckets(clock)
        self._ask_again = float("-inf")

    async def borrow(self, model: str, principal: str, per_s: float, wanted: int) -> tuple[int, float]:
        """As `Buckets.borrow`."""
        from ray.exceptions import RayError

        if self._clock() >= self._ask_again:
            try:
                return await self._ask(model, principal, per_s, wanted)
            except (TimeoutError, RayError) as error:
                self._ask_again = self._clock() + ALONE_S
                log.warning("requests are counted by each replica, for %g s: %r", ALONE_S, error)
        return self._alone.borrow(model, principal, per_s, wanted)


async def ask_root(model: str, principal: str, per_s: float, wanted: int) -> tuple[int, float]:
    """Raises TimeoutError or RayError if it does not answer within a second."""
    from ray import serve

    async with asyncio.timeout(1):
        handle: Any = serve.get_deployment_handle(ROOT, app_name=ROOT)
        return await handle.borrow.remote(model, principal, per_s, wanted)
