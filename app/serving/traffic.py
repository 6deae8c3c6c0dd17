"""Who answers: the traffic of an endpoint. What holds is the newest entry of the audit log, so that the
replicas, new ones included, agree, and "which version served at time T?" has an answer."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.audit import Audit
from app.config import Serving
from app.errors import UserError
from app.serving.variants import Deployed

ACTION = "traffic"
"""Of the entries in the audit log."""
SETTINGS = "serve"
"""Of the entries that hold an endpoint's settings: `app.config.Serving`."""


class Traffic(BaseModel):
    """An endpoint's variants and how the units are shared among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    salt: str
    policy: Literal["weighted", "bandit"]
    variants: dict[str, Deployed]

    @property
    def weights(self) -> dict[str, float]:
        """Of those that answer."""
        return {name: v.weight for name, v in self.variants.items() if v.weight > 0}


def current(audit: Audit, model: str, at: float | None = None) -> tuple[int, Traffic] | None:
    """The number and content of the entry that holds, or that held at a time; None if there is none."""
    entry = audit.last(model, ACTION, at)
    return None if entry is None else (entry.number, Traffic.model_validate(entry.details))


def change(audit: Audit, model: str, traffic: Traffic, who: str | None = None) -> int:
    """Make it what holds; returns the entry's number. Nothing is written if it holds already."""
    held = current(audit, model)
    if held and held[1] == traffic:
        return held[0]
    return audit.add(ACTION, model, json.loads(traffic.model_dump_json()), who).number


@contextlib.contextmanager
def tried(audit: Audit, model: str, traffic: Traffic, who: str | None = None) -> Iterator[int]:
    """Make it what holds while the replicas take it in; what held before holds again if they cannot, or none
    that starts later could. Gives the entry's number."""
    held = current(audit, model)
    number = change(audit, model, traffic, who)
    try:
        yield number
    except BaseException:
        if held is not None:
            change(audit, model, held[1], who)
        raise


def settings(audit: Audit, model: str) -> Serving | None:
    """What the endpoint was deployed with last; None if it never was."""
    entry = audit.last(model, SETTINGS)
    return None if entry is None else Serving.model_validate(entry.details)


def reweighted(traffic: Traffic, weights: Mapping[str, float]) -> Traffic:
    """With other weights for some variants. Raises UserError if one is unknown, or none is left above 0."""
    for name, weight in weights.items():
        variant = traffic.variants.get(name)
        if variant is None:
            raise UserError(f"there is no variant {name!r}; there are {', '.join(traffic.variants)}")
        if not 0 <= weight < float("inf"):
            raise UserError(f"the weight of {name} must be 0 or more, not {weight}")
        if variant.shadow and weight:
            raise UserError(f"{name} is a shadow: nobody sees its answers, so it takes no weight")
    variants = {
        name: variant.model_copy(update={"weight": weights.get(name, variant.weight)})
        for name, variant in traffic.variants.items()
    }
    if not any(variant.weight for variant in variants.values()):
        raise UserError("at least one variant must have a weight above 0")
    return traffic.model_copy(update={"variants": variants})
