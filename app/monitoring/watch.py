"""The watch: updates the endpoints that follow the registry, or whose weights a bandit sets.

A task that fails for one model is retried later and does not delay other models.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from app.monitoring import bandit
from app.monitoring.follow import Follower
from app.registry import promotion
from app.serving.backoff import Backoff
from app.serving.control import workers
from app.serving.logs import log
from app.serving.traffic import traffic
from app.state.audit import Audit
from app.state.locks import Busy
from app.state.records import Records

ROUND_S = 2.0
"""Pause between two rounds. Each round compares endpoints that follow the registry with the registry."""
REBALANCE_S = 30.0
"""Interval at which the weights of bandits are recomputed and unused workers are stopped."""


@dataclass(frozen=True)
class WatchReport:
    """State of the watch, for `raylway status`."""

    round_ended_s_ago: float
    """Time since the end of the last round, or since the start, in seconds."""
    num_failures: int
    """Number of failed tasks since the start."""
    last_error: str | None
    """Error of the last task that failed."""
    faults: dict[str, str]
    """Reason why registered versions are not served, or why a task fails for an endpoint, by model."""


class Stores(NamedTuple):
    """The parts of the database that the watch uses."""

    audit: Audit
    records: Records


class TaskKey(NamedTuple):
    """A task of the watch for one model, or for all models if `model` is empty."""

    model: str
    task: str


class Watch:
    """A thread that updates every endpoint in rounds, from `start` to `stop`."""

    def __init__(
        self,
        list_models: Callable[[], Iterable[str]],
        clock: Callable[[], float] = time.monotonic,
        follower: Follower | None = None,
    ):
        """`list_models` returns the names of the models that have an endpoint now."""
        self._list_models = list_models
        self._clock = clock
        self._follower = follower or Follower(clock)
        self._stores: Stores | None = None
        """None until the database has answered once."""
        self._backoffs: dict[TaskKey, Backoff] = {}
        self._errors: dict[TaskKey, str] = {}
        """Error of the last attempt, if it failed."""
        self._num_failures = 0
        self._last_error: str | None = None
        self._round_ended_at = self._rebalanced_at = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after the current round."""
        self._stopping.set()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def report(self) -> WatchReport:
        """State of the watch now."""
        faults = {key.model: error for key, error in self._errors.copy().items() if key.model}
        faults |= self._follower.faults
        return WatchReport(self._clock() - self._round_ended_at, self._num_failures, self._last_error, faults)

    def run_round(self) -> None:
        """Run the tasks that are due for each endpoint. Raises nothing."""
        models: list[str] = []
        now = self._clock()
        rebalance = now - self._rebalanced_at > REBALANCE_S
        self._rebalanced_at = now if rebalance else self._rebalanced_at

        def list_models(_: str) -> None:
            self._stores = self._stores or Stores(Audit(), Records())
            models.extend(self._list_models())

        if self._try("", "listing the endpoints", list_models):
            self._forget_others(models)
            for model in models:
                self._try(model, "following the registry", self._follow)
                if rebalance:
                    self._try(model, "setting the weights", self._rebalance)
                    self._try(model, "stopping unused workers", self._stop_unused_workers)
        self._round_ended_at = self._clock()

    def _run(self) -> None:
        while not self._stopping.wait(ROUND_S):
            self.run_round()

    def _try(self, model: str, task: str, work: Callable[[str], None]) -> bool:
        """Run `work` if the task is due; returns whether it succeeded. Exceptions are logged and counted."""
        key = TaskKey(model, task)
        backoff = self._backoffs.setdefault(key, Backoff(self._clock))
        if not backoff.due():
            return False
        try:
            work(model)
        except Exception as error:
            backoff.failed()
            self._num_failures += 1
            reason = (str(error).strip().splitlines() or [""])[0]
            self._errors[key] = self._last_error = f"{task} failed: {type(error).__name__}: {reason}"
            log.exception("%s failed for %s", task, model or "all models")
            return False
        backoff.succeeded()
        self._errors.pop(key, None)
        return True

    def _follow(self, model: str) -> None:
        assert self._stores
        with contextlib.suppress(Busy):
            promotion.finish(self._stores.audit, model)
        current = traffic.read_current(self._stores.audit, model)
        if current is not None and current.serving is not None and current.serving.follow:
            self._follower.follow(self._stores.audit, model, current)
        else:
            self._follower.forget(model)

    def _rebalance(self, model: str) -> None:
        assert self._stores
        current = traffic.read_current(self._stores.audit, model)
        if current is not None:
            bandit.rebalance(*self._stores, model, current)

    def _stop_unused_workers(self, model: str) -> None:
        assert self._stores
        workers.stop_abandoned_workers(self._stores.audit, model)

    def _forget_others(self, models: Iterable[str]) -> None:
        """Forget the failures of models that have no endpoint any more."""
        current = {"", *models}
        for entries in (self._backoffs, self._errors):
            for key in [key for key in entries if key.model not in current]:
                del entries[key]
        for model in [model for model in self._follower.faults if model not in current]:
            self._follower.forget(model)
