"""The registry's versions as an endpoint's traffic, once or for good."""

from app import registry
from app.audit import Audit
from app.bundle import schema_at
from app.config import Serving
from app.errors import UserError
from app.serving import traffic
from app.serving.applications import refresh, start_workers, stop_workers
from app.serving.status import APART
from app.serving.traffic import Traffic
from app.serving.variants import Deployed, common_schema, load

WHO = "raylway (follow)"
"""In the audit log."""


def registered(name: str, serving: Serving) -> tuple[Traffic, list[str]]:
    """An endpoint's traffic with the versions that the registry has for its variants now, and what is to be
    said.

    A variant whose alias no version bears yet is left out, so that a project with a challenger can be served
    before there is one. Raises UserError if none is left that answers, or a version that is named by number
    is not there.
    """
    found, notes = {}, []
    for variant_name, variant in serving.variants.items():
        is_number = variant.version.isdigit()
        version = (registry.resolve if is_number else registry.find)(name, variant.version)
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
                shadow=variant.shadow,
                workers=f"{name}{APART}{version.number}" if apart else None,
            )
    if not any(each.weight for each in found.values()):
        raise UserError(
            f"no version of {name!r} that serving.variants names is registered; train one first with "
            "`raylway train`"
        )
    return Traffic(salt=serving.salt, policy=serving.policy, variants=found), notes


class Follower:
    """Takes a version in when it gets an alias that the variants name."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        """By model: why what the registry has now is not served."""
        self._refused: dict[str, Traffic] = {}

    def look(self, audit: Audit, name: str, serving: Serving) -> None:
        """At one model; what it serves goes on until the new version has been tried."""
        held = traffic.current(audit, name)
        if held is None:
            return
        try:
            wanted = _kept_weights(registered(name, serving)[0], held[1])
            if wanted == held[1]:
                self.faults.pop(name, None)
                self._refused.pop(name, None)
            elif wanted != self._refused.get(name):
                self._refused[name] = wanted
                _take(audit, name, serving, wanted)
                self._refused.pop(name)
        except UserError as error:
            self.faults[name] = str(error)


def _kept_weights(wanted: Traffic, held: Traffic) -> Traffic:
    """With the weights that were set since the endpoint was deployed."""
    variants = {
        name: variant.model_copy(update={"weight": held.variants[name].weight})
        if name in held.variants and not variant.shadow and not held.variants[name].shadow
        else variant
        for name, variant in wanted.variants.items()
    }
    return wanted.model_copy(update={"variants": variants, "salt": held.salt})


def _take(audit: Audit, name: str, serving: Serving, wanted: Traffic) -> None:
    """Raises UserError if a bundle is broken, or a replica cannot take it."""
    load(wanted.variants, serving.trusted_keys)
    common_schema({variant: schema_at(deployed.path) for variant, deployed in wanted.variants.items()})
    start_workers(serving, wanted)
    with traffic.tried(audit, name, wanted, WHO) as entry:
        refresh(name, entry)
    stop_workers(name, wanted)
