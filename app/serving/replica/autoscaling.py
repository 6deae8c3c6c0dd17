"""Autoscaling of an endpoint's replicas by the load of their threads.

Serve's own measure, the number of requests in progress, does not show the load: a replica predicts one
request after the other, and the requests that wait are in its socket. So each replica reports the share of
time that its thread is busy, and the policy divides the sum of these loads by the target load.
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import get_native_id
from typing import Any, NamedTuple

LOAD = "load"
"""Name of the metric that replicas report."""
MAX_INTERVAL_S = 30.0
"""Maximum time between two calls of `ThreadLoad.share`; more is a fault. Serve calls it every 0.5 s."""


class LoadPolicy:
    """Policy of Serve's autoscaler: the number of replicas at which their mean load equals the target."""

    def __init__(self, target: float):
        """`target` is a share of a replica's time, above 0 and at most 1."""
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The number of replicas, before rounding up, and an empty state.

        `context` is Serve's AutoscalingContext. Serve rounds the number up, and applies delays and bounds.
        """
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        if not loads:
            return context.target_num_replicas, {}
        return sum(loads.values()) / self._target, {}


class _Reading(NamedTuple):
    busy_s: float
    """Time that the thread has run or waited for a core."""
    at_s: float
    """Time of the reading, on a monotonic clock."""


class ThreadLoad:
    """The load of the thread that creates it: the share of time that it runs, or waits for a core."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(f"/proc/self/task/{get_native_id()}/schedstat")
        self._last = self._read()
        self._clock = clock
        self._called_at = clock()

    def share(self) -> float:
        """The load since the last call, from 0 to 1."""
        self._called_at = self._clock()
        last, self._last = self._last, self._read()
        elapsed_s = self._last.at_s - last.at_s
        return min(1.0, (self._last.busy_s - last.busy_s) / elapsed_s) if elapsed_s > 0 else 0.0

    def faults(self) -> list[str]:
        """A message if Serve does not read the load; its autoscaler then keeps the number of replicas."""
        if self._clock() - self._called_at < MAX_INTERVAL_S:
            return []
        return [
            f"Ray Serve has not read the replica's load for {MAX_INTERVAL_S:g} s: the number of "
            "replicas does not follow the load"
        ]

    def _read(self) -> _Reading:
        # https://docs.kernel.org/scheduler/sched-stats.html: nanoseconds on a core, and waiting for one
        running_ns, waiting_ns, _ = map(int, self._file.read_text().split())
        return _Reading((running_ns + waiting_ns) / 1e9, time.perf_counter())
