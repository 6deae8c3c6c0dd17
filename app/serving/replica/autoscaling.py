"""How many replicas an endpoint wants: by the share of its time that each is busy.

Serve's own measure, requests in progress, says little here: a replica answers one request after the other,
and those that wait do so in its socket. So each replica says how busy its thread is, and this policy shares
the sum out anew.
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import get_native_id
from typing import Any

LOAD = "load"
MAX_INTERVAL_S = 30.0
"""Time between two calls of `Busyness.share` after which Serve counts as not asking. It asks every 0.5 s."""


class ByLoad:
    """For Serve's autoscaler: as many replicas as have the wanted load each."""

    def __init__(self, target: float):
        """`target` is the wanted share of a replica's time, above 0 and up to 1."""
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Takes Serve's AutoscalingContext; Serve rounds up, and applies the delays and the bounds."""
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        if not loads:
            return context.target_num_replicas, {}
        return sum(loads.values()) / self._target, {}


class Busyness:
    """The share of its time that this thread computes, or waits for a core to compute on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(f"/proc/self/task/{get_native_id()}/schedstat")
        self._before = self._seconds()
        self._clock = clock
        self._asked_at = clock()

    def faults(self) -> list[str]:
        """A message if Serve does not ask for the share: its autoscaler then keeps the number of replicas."""
        if self._clock() - self._asked_at < MAX_INTERVAL_S:
            return []
        return [
            f"Ray Serve has not asked the replica for its load for {MAX_INTERVAL_S:g} s: the number of "
            "replicas does not follow the load"
        ]

    def share(self) -> float:
        """Since the last call, from 0 to 1."""
        self._asked_at = self._clock()
        before, self._before = self._before, self._seconds()
        busy_s, passed_s = (now - then for now, then in zip(self._before, before, strict=True))
        return min(1.0, busy_s / passed_s) if passed_s > 0 else 0.0

    def _seconds(self) -> tuple[float, float]:
        """Of this thread, busy; and of the clock."""
        # https://docs.kernel.org/scheduler/sched-stats.html: on a core, and waiting for one, nanoseconds
        computing, waiting, _ = map(int, self._file.read_text().split())
        return (computing + waiting) / 1e9, time.perf_counter()
