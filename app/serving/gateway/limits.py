"""Rate limits: requests per second of a principal to a model, over all replicas of the endpoint.

One process counts the requests of all replicas. A replica borrows a few requests of a principal at a time
from it. The limit is therefore exact, however requests are spread over the replicas, and a request rarely
waits for the count.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.serving.logs import log
from app.serving.names import ROOT

LEASE_S = 0.1
"""Size of a lease: the requests that the rate allows in this time are borrowed at once."""
LEASE_LIFETIME_S = 1.0
"""Time after which borrowed requests that were not used are lost."""
BURST_S = 1.0
"""Size of a bucket: the requests that the rate allows in this time may come at once."""
FORGET_S = 60.0
"""Time after which the bucket of a principal without requests is removed. It is full by then."""
FALLBACK_S = 5.0
"""Time for which a replica counts on its own after the central count has failed."""
ROOT_TIMEOUT_S = 1.0
"""Time limit for an answer of the central count."""
MAX_PRINCIPALS = 100_000
"""Maximum number of principals that a replica keeps leases of."""


class Grant(NamedTuple):
    """Requests that a replica may admit."""

    num_requests: int
    wait_s: float
    """Time until a request may be admitted; 0 if `num_requests` is positive."""


Borrow = Callable[[str, str, float, int], Awaitable[Grant]]
"""Function with the arguments and the result of `Buckets.borrow`."""


@dataclass
class _Bucket:
    tokens: float
    updated_at: float


class Buckets:
    """Token buckets, one per model and principal.

    Turner, "New directions in communications (or which way to the information age?)", 1986.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._swept_at = clock()

    def borrow(self, model: str, principal: str, per_s: float, max_requests: int) -> Grant:
        """Take up to `max_requests` requests from a bucket that is filled at `per_s` requests per second."""
        now, capacity = self._clock(), max(1.0, per_s * BURST_S)
        bucket = self._buckets.setdefault((model, principal), _Bucket(capacity, now))
        bucket.tokens = min(capacity, bucket.tokens + (now - bucket.updated_at) * per_s)
        bucket.updated_at = now
        num_requests = min(max_requests, math.floor(bucket.tokens))
        bucket.tokens -= num_requests
        if now - self._swept_at > FORGET_S:
            self._buckets = {key: b for key, b in self._buckets.items() if now - b.updated_at < FORGET_S}
            self._swept_at = now
        return Grant(num_requests, 0.0 if num_requests else (1 - bucket.tokens) / per_s)


class _Lease(NamedTuple):
    num_requests: int
    """Borrowed requests that are not used yet."""
    expires_at: float


_NO_LEASE = _Lease(0, 0.0)


class Limiter:
    """Admits requests to one model in one replica."""

    def __init__(self, model: str, per_s: float, borrow: Borrow, clock: Callable[[], float] = time.monotonic):
        """`borrow` takes requests from the central count."""
        self._model = model
        self._per_s = per_s
        self._borrow = borrow
        self._clock = clock
        self._leases: dict[str, _Lease] = {}
        """Borrowed requests by principal."""
        self._blocked_until: dict[str, float] = {}
        """Time until which the requests of a principal are refused without a call to the central count."""

    async def admit(self, principal: str) -> float:
        """Decide whether a request of this principal is admitted.

        Returns 0 if it is, else the seconds until a request may be admitted.
        """
        now = self._clock()
        lease = self._leases.get(principal, _NO_LEASE)
        if lease.num_requests and now < lease.expires_at:
            self._leases[principal] = lease._replace(num_requests=lease.num_requests - 1)
            return 0.0
        blocked_until = self._blocked_until.get(principal, 0.0)
        if now < blocked_until:
            return blocked_until - now
        max_requests = max(1, round(self._per_s * LEASE_S))
        num_requests, wait_s = await self._borrow(self._model, principal, self._per_s, max_requests)
        now = self._clock()
        if len(self._leases) + len(self._blocked_until) > MAX_PRINCIPALS:
            self._leases.clear()
            self._blocked_until.clear()
        if not num_requests:
            # Wait at least LEASE_S, so that requests are borrowed in batches.
            self._blocked_until[principal] = now + max(wait_s, LEASE_S)
            return wait_s
        # Another request of this principal may have borrowed meanwhile.
        lease = self._leases.get(principal, _NO_LEASE)
        unused = lease.num_requests if now < lease.expires_at else 0
        self._leases[principal] = _Lease(num_requests - 1 + unused, now + LEASE_LIFETIME_S)
        return 0.0


class CentralCount:
    """A replica's access to the central count, which `app.serving.control.root` keeps.

    If the central count does not answer, the replica counts on its own for FALLBACK_S and then tries again: a
    central count that hangs delays one request per FALLBACK_S.
    """

    def __init__(self, borrow: Borrow, clock: Callable[[], float] = time.monotonic):
        """`borrow` calls the central count. It may raise TimeoutError or RayError."""
        self._borrow = borrow
        self._clock = clock
        self._local = Buckets(clock)
        self._retry_at = float("-inf")

    async def borrow(self, model: str, principal: str, per_s: float, max_requests: int) -> Grant:
        """Borrow from the central count, or from this replica's own if that fails."""
        from ray.exceptions import RayError

        if self._clock() >= self._retry_at:
            try:
                return await self._borrow(model, principal, per_s, max_requests)
            except (TimeoutError, RayError) as error:
                self._retry_at = self._clock() + FALLBACK_S
                log.warning("each replica enforces rate limits on its own for %g s: %r", FALLBACK_S, error)
        return self._local.borrow(model, principal, per_s, max_requests)


async def borrow_from_root(model: str, principal: str, per_s: float, max_requests: int) -> Grant:
    """Borrow from the central count. Raises TimeoutError or RayError if it does not answer."""
    from ray import serve

    async with asyncio.timeout(ROOT_TIMEOUT_S):
        handle: Any = serve.get_deployment_handle(ROOT, app_name=ROOT)
        return await handle.borrow.remote(model, principal, per_s, max_requests)
