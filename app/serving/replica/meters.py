"""Metrics of requests: for Prometheus, through Ray's metrics, and for `raylway status`."""

import math
import time
from collections import Counter as Counts
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LATENCY_BUCKETS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
"""Upper bounds of the buckets of LATENCY."""
ROWS_BUCKETS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
"""Upper bounds of the buckets of ROWS."""
# Names of the metrics.
REQUESTS = "raylway_requests"
LATENCY = "raylway_request_seconds"
ROWS = "raylway_request_rows"
DROPPED = "raylway_predictions_not_recorded"
SHARE = "raylway_variant_share"
MAX_BUFFERED_REQUESTS = 100_000
"""Maximum number of requests in the buffer, about 20 MB. Further ones are not counted."""
WINDOW_S = 60.0
"""Length of the window of `RecentRequests`."""
SLOT_S = 5.0
"""Length of the slots in which requests enter and leave the window."""
LATENCY_RATIO = 1.1
"""Ratio of neighbouring latencies in `RequestStats`: each latency is rounded to a power of it."""


@dataclass(frozen=True, slots=True)
class CompletedRequest:
    """The measurements of one request."""

    action: str
    variant: str
    """Variant that answered; empty if none did."""
    status: int
    seconds: float
    num_rows: int


@dataclass
class RequestStats:
    """Statistics of the requests to a variant."""

    num_requests: int = 0
    num_errors: int = 0
    """Number of requests with a server error, status 5xx."""
    latencies: Counts[int] = field(default_factory=Counts)
    """Number of requests by latency, as the exponent of LATENCY_RATIO that is nearest to the seconds."""

    def add(self, other: "RequestStats") -> None:
        """Add the requests of another replica or slot."""
        self.num_requests += other.num_requests
        self.num_errors += other.num_errors
        self.latencies.update(other.latencies)

    def quantile_s(self, quantile: float) -> float:
        """A quantile of the latency, at most 5 % off; NaN without requests."""
        rank = quantile * self.latencies.total()
        for exponent, count in sorted(self.latencies.items()):
            rank -= count
            if rank <= 0:
                return LATENCY_RATIO**exponent
        return math.nan


class RecentRequests:
    """Statistics of each variant over the last WINDOW_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._slots: deque[tuple[float, dict[str, RequestStats]]] = deque()
        """Start and statistics of each slot, the oldest first."""

    def add(self, requests: Iterable[CompletedRequest]) -> None:
        """Add requests that have just completed. Those that no variant answered are left out."""
        now = self._clock()
        self._remove_old_slots(now)
        if not self._slots or now - self._slots[-1][0] > SLOT_S:
            self._slots.append((now, {}))
        slot = self._slots[-1][1]
        for request in requests:
            if not request.variant:
                continue
            stats = slot.setdefault(request.variant, RequestStats())
            stats.num_requests += 1
            stats.num_errors += request.status >= 500
            stats.latencies[round(math.log(max(request.seconds, 1e-6), LATENCY_RATIO))] += 1

    def by_variant(self) -> dict[str, RequestStats]:
        """Statistics of the variants that answered within the window."""
        self._remove_old_slots(self._clock())
        return merge(stats for _, stats in self._slots)

    def _remove_old_slots(self, now: float) -> None:
        while self._slots and now - self._slots[0][0] > WINDOW_S:
            self._slots.popleft()


def merge(parts: Iterable[Mapping[str, RequestStats]]) -> dict[str, RequestStats]:
    """The sum of statistics by variant over several slots or replicas."""
    total: dict[str, RequestStats] = {}
    for part in parts:
        for variant, stats in part.items():
            total.setdefault(variant, RequestStats()).add(stats)
    return total


def cumulative_counts(bounds: Sequence[float], values: Sequence[float]) -> list[int]:
    """Number of values less than or equal to each bound."""
    counts: list[int] = np.searchsorted(np.sort(values), bounds, side="right").tolist()
    return counts


class Histogram:
    """A Prometheus histogram made of three counters: NAME_bucket (label `le`), NAME_sum and NAME_count.

    Ray's own histogram makes the agent of each node replay every observation every ten seconds. At 1,000
    requests per second the replay takes half a second of a core, which the replicas then lack.
    """

    def __init__(self, name: str, description: str, bounds: Sequence[float], tag_keys: tuple[str, ...]):
        from ray.util.metrics import Counter

        self._bounds = [*bounds, math.inf]
        self._labels = [*map(str, bounds), "+Inf"]
        self._bucket = Counter(f"{name}_bucket", description, (*tag_keys, "le"))
        self._sum = Counter(f"{name}_sum", description, tag_keys)
        self._count = Counter(f"{name}_count", description, tag_keys)

    def observe(self, values: Sequence[float], tags: Mapping[str, str]) -> None:
        """Add observations: at least one, and all above 0."""
        for label, count in zip(self._labels, cumulative_counts(self._bounds, values), strict=True):
            if count:
                self._bucket.inc(count, {**tags, "le": label})
        self._sum.inc(sum(values), dict(tags))
        self._count.inc(len(values), dict(tags))


class Meters:
    """The metrics of an endpoint in a replica.

    Requests are buffered and reported in batches: one call of Ray's metrics takes longer than routing does.
    """

    def __init__(self, model: str):
        from ray.util.metrics import Counter, Gauge

        keys = ("model", "variant", "action", "status")
        self._requests = Counter(REQUESTS, "Requests answered.", tag_keys=keys)
        self._latency = Histogram(
            LATENCY, "Time from the complete request to its answer, in seconds.", LATENCY_BUCKETS_S, keys
        )
        self._rows = Histogram(ROWS, "Rows of a request.", ROWS_BUCKETS, ("model", "variant"))
        self._dropped = Gauge(DROPPED, "Predictions that were not recorded.", ("model",))
        self._share = Gauge(SHARE, "A variant's share of the units.", ("model", "variant"))
        self._model = model
        self._buffer: list[CompletedRequest] = []
        self._variants: set[str] = set()
        """Variants whose share was reported."""
        self.recent = RecentRequests()

    def observe(self, request: CompletedRequest) -> None:
        """Buffer a request for the next report."""
        if len(self._buffer) < MAX_BUFFERED_REQUESTS:
            self._buffer.append(request)

    def report(self, num_dropped: int, weights: Mapping[str, float]) -> None:
        """Report the buffered requests, and set the gauges.

        :param num_dropped: number of predictions that were not recorded since the start of the replica.
        :param weights: current weights of the variants. A variant without one has share 0.
        """
        requests, self._buffer = self._buffer, []
        self.recent.add(requests)
        groups: dict[tuple[str, str, str], list[CompletedRequest]] = defaultdict(list)
        for request in requests:
            groups[request.variant, request.action or "metadata", str(request.status)].append(request)
        for (variant, action, status), group in groups.items():
            tags = {"model": self._model, "variant": variant}
            if num_rows := [request.num_rows for request in group if request.num_rows]:
                self._rows.observe(num_rows, tags)
            tags |= {"action": action, "status": status}
            self._requests.inc(len(group), tags)
            self._latency.observe([request.seconds for request in group], tags)
        self._dropped.set(num_dropped, {"model": self._model})
        self._variants |= set(weights)
        for variant in self._variants:
            share = weights.get(variant, 0.0) / sum(weights.values())
            self._share.set(share, {"model": self._model, "variant": variant})
