"""What is measured of requests: for Prometheus, by way of Ray's metrics, and for `raylway status`."""

import math
import time
from collections import Counter as Counts
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LATENCY_BUCKETS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
BATCH_BUCKETS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
REQUESTS = "raylway_requests"
LATENCY = "raylway_request_seconds"
ROWS = "raylway_request_rows"
DROPPED = "raylway_predictions_not_recorded"
SHARE = "raylway_variant_share"
MAX_NOTES = 100_000
"""Most notes that wait, some 20 MB: Ray's metrics may be away, but requests are answered."""
WINDOW_S, SLOT_S = 60.0, 5.0
FINENESS = 1.1
"""Latencies are counted by the nearest power of this."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered."""

    action: str
    variant: str
    """Empty if none was asked."""
    status: int
    seconds: float
    rows: int


@dataclass
class Tally:
    """The requests to a variant."""

    requests: int = 0
    errors: int = 0
    """Of our own: 5xx."""
    latencies: Counts[int] = field(default_factory=Counts)
    """How many took as long as each step of FINENESS."""

    def add(self, other: "Tally") -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.latencies.update(other.latencies)

    def quantile_s(self, quantile: float) -> float:
        """A latency in seconds, 5 % off at most; NaN if there was no request."""
        rank = quantile * self.latencies.total()
        for step, count in sorted(self.latencies.items()):
            rank -= count
            if rank <= 0:
                return FINENESS**step
        return math.nan


class Recent:
    """The tallies of each variant over the last WINDOW_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._slots: deque[tuple[float, dict[str, Tally]]] = deque()

    def add(self, asked: Iterable["Answered"]) -> None:
        now = self._clock()
        self._forget(now)
        if not self._slots or now - self._slots[-1][0] > SLOT_S:
            self._slots.append((now, {}))
        tallies = self._slots[-1][1]
        for each in asked:
            if not each.variant:
                continue
            tally = tallies.setdefault(each.variant, Tally())
            tally.requests += 1
            tally.errors += each.status >= 500
            tally.latencies[round(math.log(max(each.seconds, 1e-6), FINENESS))] += 1

    def tallies(self) -> dict[str, Tally]:
        self._forget(self._clock())
        return merged(tallies for _, tallies in self._slots)

    def _forget(self, now: float) -> None:
        while self._slots and now - self._slots[0][0] > WINDOW_S:
            self._slots.popleft()


def merged(parts: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Of several slots, or several replicas."""
    found: dict[str, Tally] = {}
    for part in parts:
        for variant, tally in part.items():
            found.setdefault(variant, Tally()).add(tally)
    return found


def at_most(bounds: Sequence[float], values: Sequence[float]) -> list[int]:
    """Number of values less than or equal to each bound."""
    counts: list[int] = np.searchsorted(np.sort(values), bounds, side="right").tolist()
    return counts


class Histogram:
    """A Prometheus histogram made of three counters: NAME_bucket (label `le`), NAME_sum and NAME_count.

    Ray's own histogram makes the agent of each node replay every observation every ten seconds. At 1,000
    requests per second that takes half a second of a core, during which replicas wait.
    """

    def __init__(self, name: str, description: str, bounds: Sequence[float], tag_keys: tuple[str, ...]):
        from ray.util.metrics import Counter

        self._bounds = [*bounds, math.inf]
        self._labels = [*map(str, bounds), "+Inf"]
        self._bucket = Counter(f"{name}_bucket", description, (*tag_keys, "le"))
        self._sum = Counter(f"{name}_sum", description, tag_keys)
        self._count = Counter(f"{name}_count", description, tag_keys)

    def observe(self, values: Sequence[float], tags: Mapping[str, str]) -> None:
        """Add observations: at least one, all above 0."""
        for label, count in zip(self._labels, at_most(self._bounds, values), strict=True):
            if count:
                self._bucket.inc(count, {**tags, "le": label})
        self._sum.inc(sum(values), dict(tags))
        self._count.inc(len(values), dict(tags))


class Meters:
    """Notes on the way of a request, told to Ray together: each note there takes longer than routing does."""

    def __init__(self, model: str):
        from ray.util.metrics import Counter, Gauge

        keys = ("model", "variant", "action", "status")
        self._requests = Counter(REQUESTS, "Requests answered.", tag_keys=keys)
        self._latency = Histogram(
            LATENCY, "From the whole request to its answer, in seconds.", LATENCY_BUCKETS_S, keys
        )
        self._rows = Histogram(ROWS, "Rows of a request.", BATCH_BUCKETS, ("model", "variant"))
        self._dropped = Gauge(DROPPED, "Predictions that were not recorded.", ("model",))
        self._share = Gauge(SHARE, "A variant's share of the units.", ("model", "variant"))
        self._model = model
        self._asked: list[Answered] = []
        self._variants: set[str] = set()
        self.recent = Recent()

    def note(self, asked: Answered) -> None:
        if len(self._asked) < MAX_NOTES:
            self._asked.append(asked)

    def tell(self, dropped: int, weights: Mapping[str, float]) -> None:
        """Everything noted since the last time, and what holds now."""
        asked, self._asked = self._asked, []
        self.recent.add(asked)
        alike: dict[tuple[str, str, str], list[Answered]] = defaultdict(list)
        for each in asked:
            alike[each.variant, each.action or "metadata", str(each.status)].append(each)
        for (variant, action, status), requests in alike.items():
            tags = {"model": self._model, "variant": variant}
            if rows := [each.rows for each in requests if each.rows]:
                self._rows.observe(rows, tags)
            tags |= {"action": action, "status": status}
            self._requests.inc(len(requests), tags)
            self._latency.observe([each.seconds for each in requests], tags)
        self._dropped.set(dropped, {"model": self._model})
        self._variants |= set(weights)
        for variant in self._variants:
            share = weights.get(variant, 0.0) / sum(weights.values())
            self._share.set(share, {"model": self._model, "variant": variant})
