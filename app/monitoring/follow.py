"""The registry's versions as an endpoint's traffic, once or for good."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from app.bundle.schema import schema_at
from app.config import Serving
from app.errors import UserError
from app.registry import versions
from app.serving.backoff import Backoff
from app.serving.control.applications import refresh, start_workers, stop_workers
from app.serving.control.status import APART
from app.serving.traffic.traffic import Held, Traffic, traffic
from app.serving.traffic.variants import Deployed, common_schema, load
from app.state.audit import Audit
from app.state.database import Busy

WHO = "raylway (follow)"
"""Author of the follower's entries in the audit log."""


def registered(name: str, serving: Serving) -> tuple[Traffic, list[str]]:
    """An endpoint's traffic with the versions that the registry has for its variants now, and notes for the
    user.

    A variant whose alias no version bears yet is left out, so that a project with a challenger can be served
    before there is one. Raises UserError if no variant with a weight is left, or if there is no version with
    a number that `serving.variants` names.
    """
    found, notes = _variants(name, serving)
    if not any(variant.weight for variant in found.values()):
        raise UserError(
            f"no version of {name!r} that serving.variants names with a weight is registered; train one "
            "first with `raylway train`"
        )
    return Traffic(salt=serving.salt, policy=serving.policy, variants=found), notes


class Follower:
    """Takes a version in when it gets an alias that the variants name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.faults: dict[str, str] = {}
        """By model: why what the registry has now is not served."""
        self._clock = clock
        self._refused: dict[str, tuple[Mapping[str, Deployed], Backoff]] = {}
        """By model: the variants that could not be taken in, and when to try them again."""

    def look(self, audit: Audit, name: str, held: Held) -> None:
        """Serve what the registry has for a model now; what it serves goes on until that has been tried."""
        assert held.serving is not None
        wanted, backoff = {}, Backoff(self._clock)
        try:
            wanted = _kept_weights(_variants(name, held.serving)[0], held.traffic)
            refused, waiting = self._refused.get(name, (None, backoff))
            backoff = waiting if wanted == refused else backoff
            if _what(wanted) != _what(held.traffic.variants):
                if not backoff.due():
                    return
                with traffic.alone(name, wait=False):
                    _take(audit, name, held, wanted)
            self.forget(name)
        except Busy:
            return  # somebody is changing it; look again later
        except UserError as error:
            backoff.failed()
            self._refused[name] = wanted, backoff
            self.faults[name] = str(error)

    def forget(self, name: str) -> None:
        """Forget the faults of a model."""
        self.faults.pop(name, None)
        self._refused.pop(name, None)


def _variants(name: str, serving: Serving) -> tuple[dict[str, Deployed], list[str]]:
    """The variants that have a version now, and notes on the others."""
    found, notes = {}, []
    for variant_name, variant in serving.variants.items():
        is_number = variant.version.isdigit()
        version = (versions.resolve if is_number else versions.find)(name, variant.version)
        if version is None:
            notes.append(
                f"the variant {variant_name} is left out: no version has the alias {variant.version!r} yet"
            )
        else:
            apart = variant.shadow or variant.workers is not None
            found[variant_name] = Deployed(
                version=version.number,
                weight=variant.weight,
                path=version.path,
                identity=version.identity,
                shadow=variant.shadow,
                workers=f"{name}{APART}{version.number}" if apart else None,
            )
    return found, notes


def _what(variants: Mapping[str, Deployed]) -> dict[str, Deployed]:
    """The variants by what they are, not by where somebody has a copy of it."""
    return {n: v.model_copy(update={"path": Path()}) if v.identity else v for n, v in variants.items()}


def _kept_weights(wanted: Mapping[str, Deployed], held: Traffic) -> dict[str, Deployed]:
    """With the weights that were set since the endpoint was deployed.

    Raises UserError if nobody would answer.
    """
    kept = {
        name: variant.model_copy(update={"weight": held.variants[name].weight})
        if name in held.variants and not variant.shadow and not held.variants[name].shadow
        else variant
        for name, variant in wanted.items()
    }
    if not any(variant.weight for variant in kept.values()):
        names = ", ".join(name for name, variant in kept.items() if not variant.shadow) or "none"
        raise UserError(
            "the registry's aliases leave no variant with a weight above 0 (variants with a version: "
            f"{names}); what is served goes on. Raise a weight with `raylway traffic`, or register a version."
        )
    return kept


def _take(audit: Audit, name: str, held: Held, variants: Mapping[str, Deployed]) -> None:
    """Raises UserError if a bundle is broken, a replica cannot take it, or `held` does not hold any more."""
    assert held.serving is not None
    wanted = held.traffic.model_copy(update={"variants": dict(variants)})
    load(wanted.variants, held.serving.trusted_keys)
    common_schema({variant: schema_at(deployed.path) for variant, deployed in wanted.variants.items()})
    try:
        start_workers(name, held.serving, wanted)
        with traffic.tried(audit, name, wanted, held.serving, WHO, expected=held.number) as entry:
            refresh(name, entry)
    finally:
        stop_workers(audit, name)
