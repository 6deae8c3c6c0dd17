"""The watch over endpoints that follow the registry, or whose weights a bandit sets.

A failure for one model is tried again later, and delays no other model.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from app.monitoring import bandit
from app.monitoring.follow import Follower
from app.registry import versions
from app.serving.backoff import Backoff
from app.serving.control import applications
from app.serving.logs import log
from app.serving.traffic import traffic
from app.state.audit import Audit
from app.state.database import Busy
from app.state.records import Records

ROUND_S = 2.0
"""Pause between two rounds; in each, endpoints that follow the registry are compared with it."""
REBALANCE_S = 30.0
"""Interval at which a bandit's weights are recomputed and unused workers are stopped."""


@dataclass(frozen=True)
class WatchReport:
    """What the watch does, for `raylway status`."""

    looked_s_ago: float
    """Time since the end of the last round, or since the start."""
    failures: int
    """Number of failed tasks since the start."""
    last_error: str | None
    faults: dict[str, str]
    """Reason why registered versions are not served, or why an endpoint is not looked after, by model."""


class Watch:
    """A thread that looks after each endpoint, from `start` to `stop`."""

    def __init__(
        self,
        models: Callable[[], Iterable[str]],
        clock: Callable[[], float] = time.monotonic,
        follower: Follower | None = None,
    ):
        """`models` returns the names of the models that have an endpoint now."""
        self._models = models
        self._clock = clock
        self._follower = follower or Follower(clock)
        self._stores: tuple[Audit, Records] | None = None
        self._backoffs: dict[tuple[str, str], Backoff] = {}
        self._errors: dict[tuple[str, str], str] = {}
        """Reason why the last try failed, by model and task."""
        self._failures = 0
        self._last_error: str | None = None
        self._round_ended_at = self._rebalanced_at = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def report(self) -> WatchReport:
        faults = {model: error for (model, _), error in self._errors.copy().items() if model}
        faults |= self._follower.faults
        return WatchReport(self._clock() - self._round_ended_at, self._failures, self._last_error, faults)

    def round(self) -> None:
        """Look after each endpoint once. Raises nothing."""
        models: list[str] = []
        now = self._clock()
        rebalance = now - self._rebalanced_at > REBALANCE_S
        self._rebalanced_at = now if rebalance else self._rebalanced_at

        def list_models(_: str) -> None:
            self._stores = self._stores or (Audit(), Records())
            models.extend(self._models())

        if self._try("", "listing the endpoints", list_models):
            self._forget_all_but(models)
            for model in models:
                self._try(model, "following the registry", self._follow)
                if rebalance:
                    self._try(model, "setting the weights", self._rebalance)
                    self._try(model, "stopping workers", self._tidy)
        self._round_ended_at = self._clock()

    def _run(self) -> None:
        while not self._stopping.wait(ROUND_S):
            self.round()

    def _try(self, model: str, task: str, work: Callable[[str], None]) -> bool:
        """Run `work` if it is due; returns whether it succeeded. Exceptions are logged and counted."""
        key = (model, task)
        backoff = self._backoffs.setdefault(key, Backoff(self._clock))
        if not backoff.due():
            return False
        try:
            work(model)
        except Exception as error:
            backoff.failed()
            self._failures += 1
            reason = (str(error).strip().splitlines() or [""])[0]
            self._errors[key] = self._last_error = f"{task} failed: {type(error).__name__}: {reason}"
            log.exception("%s of %s failed", task, model or "all models")
            return False
        backoff.succeeded()
        self._errors.pop(key, None)
        return True

    def _follow(self, model: str) -> None:
        assert self._stores
        with contextlib.suppress(Busy):
            versions.finish_promotion(self._stores[0], model)
        current = traffic.read_current(self._stores[0], model)
        if current is not None and current.serving is not None and current.serving.follow:
            self._follower.follow(self._stores[0], model, current)
        else:
            self._follower.forget(model)

    def _rebalance(self, model: str) -> None:
        assert self._stores
        audit, records = self._stores
        current = traffic.read_current(audit, model)
        if current is not None:
            bandit.rebalance(audit, records, model, current)

    def _tidy(self, model: str) -> None:
        assert self._stores
        applications.tidy(self._stores[0], model)

    def _forget_all_but(self, models: Iterable[str]) -> None:
        kept = {"", *models}
        for entries in (self._backoffs, self._errors):
            for key in [key for key in entries if key[0] not in kept]:
                del entries[key]
        for model in [model for model in self._follower.faults if model not in kept]:
            self._follower.forget(model)
