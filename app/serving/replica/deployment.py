"""The Ray Serve deployment of a model. Each replica runs the endpoint and the services that it uses."""

import asyncio
import gc
import sys

import starlette.requests
import starlette.responses

from app.cluster.requirements import require_tested_versions
from app.config import Serving
from app.config.serving import Issuer
from app.serving.gateway import limits
from app.serving.gateway.auth import Authenticator
from app.serving.gateway.guard import DIRECT_PATH, through_serve
from app.serving.gateway.limits import Limiter
from app.serving.logs import log
from app.serving.replica.autoscaling import LOAD, ThreadLoad
from app.serving.replica.call import Services
from app.serving.replica.endpoint import Endpoint
from app.serving.replica.loaded import Loaded
from app.serving.replica.loader import Loader
from app.serving.replica.meters import Meters
from app.serving.replica.recorder import Recorder
from app.serving.replica.shadow import Shadows
from app.serving.replica.state import State
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import with_local_bundles
from app.state.audit import Audit
from app.state.records import Records

UPDATE_S = 1.0
"""Interval at which a replica checks for new traffic."""
SWITCH_S = 0.0005
"""The recorder's threads may hold the GIL this long before a request gets it (Python's default: 5 ms)."""


class Replica:
    """Every replica loads all variants of its model, except those that have workers of their own."""

    def __init__(self, model: str, serving: Serving, issuer: Issuer | None):
        """Raises UserError if a bundle is broken, the variants take different inputs, or the node has another
        version of Ray or Optuna."""
        require_tested_versions()
        sys.setswitchinterval(SWITCH_S)
        self._model = model
        self._authenticator = Authenticator(issuer) if issuer else None
        if self._authenticator is not None:
            self._authenticator.keys.start()
        limiter = None
        if serving.limits.requests_per_s is not None:
            borrow = limits.CentralCount(limits.borrow_from_root).borrow
            limiter = Limiter(model, serving.limits.requests_per_s, borrow)

        def load(traffic: Traffic, previous: Loaded | None) -> Loaded:
            local = traffic.model_copy(update={"variants": with_local_bundles(model, traffic.variants)})
            return Loaded(local, serving.limits.max_rows, previous, serving.trusted_keys)

        self._audit = Audit()
        self._loader = Loader(model, self._audit, load)
        self._recorder = Recorder(Records(), serving.limits.feedback_per_hour) if serving.record else None
        self._shadows = Shadows(self._recorder.add if self._recorder else None)
        self._shadows.update(self._loader.loaded)
        self._meters = Meters(model)
        self._thread_load = ThreadLoad()
        endpoint = Endpoint(
            Services(
                model=model,
                limits=serving.limits,
                loader=self._loader,
                shadows=self._shadows,
                meters=self._meters,
                authenticator=self._authenticator,
                limiter=limiter,
                recorder=self._recorder,
            ),
            serving.log_requests,
        )
        self.respond = endpoint.respond
        """Called by `app.serving.gateway.guard` for each request."""
        # Exclude everything loaded so far from garbage collection: a full pass would stall requests 50 ms.
        gc.collect()
        gc.freeze()
        self._hook_faults: list[str] = []
        DIRECT_PATH.has_deployment = True
        self._updates = asyncio.get_running_loop().create_task(self._update_forever())

    async def __del__(self) -> None:
        """Called by Serve when the last request is answered. Writes the records that still wait."""
        self._updates.cancel()
        if self._authenticator is not None:
            self._authenticator.keys.stop()
        self._shadows.close()
        if self._recorder:
            await asyncio.to_thread(self._recorder.close)
        self._audit.close()

    async def __call__(self, request: starlette.requests.Request) -> starlette.responses.Response:
        """Answer a request that Serve's own proxy passes on."""
        return await through_serve(self, request)

    def check_health(self) -> None:
        """Raise an exception unless the replica works. Called by Serve, which then replaces the replica.

        Raises BrokenBundle if a variant does not reproduce its stored example, and RuntimeError if the
        replica no longer checks for new traffic.
        """
        if self._updates.done():
            raise RuntimeError("the task that checks for new traffic has ended")
        for bundle in self._loader.loaded.bundles.values():
            bundle.check_example()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The metrics for `app.serving.replica.autoscaling`, by name. Called by Serve."""
        return {LOAD: self._thread_load.share()}

    def state(self) -> State:
        """State of the replica now. Called by commands, through Serve's handle."""
        loaded = self._loader.loaded
        fault = self._loader.fault or (self._authenticator.keys.fault if self._authenticator else None)
        return State(
            entry=self._loader.entry,
            fault=fault,
            versions=loaded.versions,
            weights=loaded.weights,
            recording=self._recorder.status() if self._recorder else None,
            shadows=self._shadows.dropped(),
            recent=self._meters.recent.by_variant(),
            hook_faults=self._find_hook_faults(),
        )

    async def refresh(self) -> State:
        """Load the newest traffic now; returns the state after that."""
        await self._update(retry_now=True)
        return self.state()

    def _find_hook_faults(self) -> list[str]:
        return [*DIRECT_PATH.faults(), *self._thread_load.faults()]

    async def _update(self, retry_now: bool = False) -> None:
        if await self._loader.update(retry_now):
            self._shadows.update(self._loader.loaded)

    async def _update_forever(self) -> None:
        while True:
            await asyncio.sleep(UPDATE_S)
            try:
                await self._update()
                dropped = self._recorder.status().dropped if self._recorder else {}
                self._meters.report(sum(dropped.values()), self._loader.loaded.weights)
                if (faults := self._find_hook_faults()) != self._hook_faults:
                    self._hook_faults = faults
                    log.error(
                        "%s: %s", self._model, "; ".join(faults) or "all hooks into Ray Serve work again"
                    )
            except Exception:
                log.exception("%s cannot check for new traffic, or report its metrics", self._model)
