"""The watch over endpoints that follow the registry, or whose weights a bandit sets: a thread of
`app.serving.control.root`. What fails for one model is tried again later, and holds up no other."""

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
from app.serving.traffic.traffic import traffic
from app.state.audit import Audit
from app.state.database import Busy
from app.state.records import Records

LOOK_S = 2.0
"""How often the registry is looked at, for endpoints that follow it."""
REBALANCE_S = 30.0
"""How often a bandit's weights are computed anew, and workers that nobody needs are stopped."""


@dataclass(frozen=True)
class Watched:
    """What the watch did, for `raylway status`."""

    looked_s_ago: float
    """Time since it last came to the end of a round, or began."""
    failures: int
    """Failed tries since it began."""
    last_error: str | None
    faults: dict[str, str]
    """By model: why what the registry has now is not served, or why its endpoint is not looked after."""


class Watch:
    """The thread, from `start` to `stop`."""

    def __init__(
        self,
        models: Callable[[], Iterable[str]],
        clock: Callable[[], float] = time.monotonic,
        follower: Follower | None = None,
    ):
        """`models` returns the models that have an endpoint now."""
        self._models = models
        self._clock = clock
        self._follower = follower or Follower(clock)
        self._stores: tuple[Audit, Records] | None = None
        self._backoffs: dict[tuple[str, str], Backoff] = {}
        self._errors: dict[tuple[str, str], str] = {}
        """By model and task: why the last try failed."""
        self._failures = 0
        self._last_error: str | None = None
        self._looked = self._rebalanced = clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def watched(self) -> Watched:
        faults = {model: error for (model, _), error in self._errors.copy().items() if model}
        faults |= self._follower.faults
        return Watched(self._clock() - self._looked, self._failures, self._last_error, faults)

    def round(self) -> None:
        """Look after each endpoint once. Raises nothing."""
        models: list[str] = []
        now = self._clock()
        rebalance = now - self._rebalanced > REBALANCE_S
        self._rebalanced = now if rebalance else self._rebalanced

        def find(_: str) -> None:
            self._stores = self._stores or (Audit(), Records())
            models.extend(self._models())

        if self._done("", "finding the endpoints", find):
            self._forget_all_but(models)
            for model in models:
                self._done(model, "following the registry", self._follow)
                if rebalance:
                    self._done(model, "setting the weights", self._rebalance)
                    self._done(model, "stopping workers", self._tidy)
        self._looked = self._clock()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.round()

    def _done(self, model: str, task: str, work: Callable[[str], None]) -> bool:
        """Do it, if it is due; returns whether it was done. What it raises is logged and counted."""
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
        held = traffic.current(self._stores[0], model)
        if held is not None and held.serving is not None and held.serving.follow:
            self._follower.look(self._stores[0], model, held)
        else:
            self._follower.forget(model)

    def _rebalance(self, model: str) -> None:
        assert self._stores
        audit, records = self._stores
        held = traffic.current(audit, model)
        if held is not None:
            bandit.rebalance(audit, records, model, held)

    def _tidy(self, model: str) -> None:
        assert self._stores
        applications.tidy(self._stores[0], model)

    def _forget_all_but(self, models: Iterable[str]) -> None:
        kept = {"", *models}
        for known in (self._backoffs, self._errors):
            for key in [key for key in known if key[0] not in kept]:
                del known[key]
        for model in [model for model in self._follower.faults if model not in kept]:
            self._follower.forget(model)
