"""Endpoints that follow the registry: a version is deployed when it gets an alias that a variant names."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from app.bundle.schema import schema_at
from app.errors import UserError
from app.serving.backoff import Backoff
from app.serving.control.replicas import refresh
from app.serving.control.workers import start_workers, stop_unused_workers
from app.serving.traffic import traffic
from app.serving.traffic.registered import registered_variants
from app.serving.traffic.traffic import Traffic, TrafficEntry
from app.serving.traffic.variants import DeployedVariant, common_schema, open_bundles
from app.state.audit import Audit
from app.state.locks import Busy

AUTHOR = "raylway (follow)"
"""Author of the follower's entries in the audit log."""


class FailedAttempt(NamedTuple):
    """Registered variants that could not be served."""

    variants: Mapping[str, DeployedVariant]
    backoff: Backoff
    """Time of the next attempt with the same variants."""


class Follower:
    """Deploys the versions that the aliases of an endpoint's variants name now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.faults: dict[str, str] = {}
        """Reason why the registered versions of a model are not served, by model."""
        self._clock = clock
        self._failures: dict[str, FailedAttempt] = {}
        """Last failed attempt, by model."""

    def follow(self, audit: Audit, name: str, current: TrafficEntry) -> None:
        """Deploy the versions that the registry has for a model now, if the endpoint serves others.

        If that fails, the endpoint keeps its versions, the reason is in `faults`, and later calls retry with
        growing delays.
        """
        assert current.serving is not None
        registered, backoff = {}, Backoff(self._clock)
        try:
            registered = _with_current_weights(registered_variants(name, current.serving)[0], current.traffic)
            failure = self._failures.get(name)
            if failure is not None and failure.variants == registered:
                backoff = failure.backoff
            if _without_paths(registered) != _without_paths(current.traffic.variants):
                if not backoff.due():
                    return
                with traffic.endpoint_lock(name, wait=False):
                    _replace(audit, name, current, registered)
            self.forget(name)
        except Busy:
            return  # somebody is changing the endpoint; the next round checks it again
        except UserError as error:
            backoff.failed()
            self._failures[name] = FailedAttempt(registered, backoff)
            self.faults[name] = str(error)

    def forget(self, name: str) -> None:
        """Remove the fault and the failed attempt of a model."""
        self.faults.pop(name, None)
        self._failures.pop(name, None)


def _without_paths(variants: Mapping[str, DeployedVariant]) -> dict[str, DeployedVariant]:
    """The variants for a comparison by identity: copies of a bundle on two machines are the same bundle."""
    return {n: v.model_copy(update={"path": Path()}) if v.identity else v for n, v in variants.items()}


def _with_current_weights(
    registered: Mapping[str, DeployedVariant], current: Traffic
) -> dict[str, DeployedVariant]:
    """The registered variants with the current weights, which may have been set after the deployment.

    Raises UserError if no variant has a weight above 0.
    """
    variants = {
        name: variant.model_copy(update={"weight": current.variants[name].weight})
        if name in current.variants and not variant.shadow and not current.variants[name].shadow
        else variant
        for name, variant in registered.items()
    }
    if not any(variant.weight for variant in variants.values()):
        names = ", ".join(name for name, variant in variants.items() if not variant.shadow) or "none"
        raise UserError(
            "a variant with a registered version must have a weight above 0, and none has (variants with a "
            f"version: {names}). The endpoint keeps its versions. Raise a weight with `raylway traffic`, or "
            "register a version."
        )
    return variants


def _replace(audit: Audit, name: str, current: TrafficEntry, variants: Mapping[str, DeployedVariant]) -> None:
    """Deploy other variants.

    Raises UserError if a bundle is broken, a replica cannot load it, or `current` is not the newest entry.
    """
    assert current.serving is not None
    replacement = current.traffic.model_copy(update={"variants": dict(variants)})
    open_bundles(replacement.variants, current.serving.trusted_keys)
    common_schema({variant: schema_at(deployed.path) for variant, deployed in replacement.variants.items()})
    try:
        start_workers(name, current.serving, replacement)
        with traffic.set_with_rollback(
            audit, name, replacement, current.serving, AUTHOR, expected=current.number
        ) as entry:
            refresh(name, entry)
    finally:
        stop_unused_workers(audit, name)
