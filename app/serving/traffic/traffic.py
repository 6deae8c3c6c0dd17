"""The traffic of an endpoint: which variants answer which share of the units.

What holds is the model's newest entry in the audit log, so that all replicas agree, new ones included, and
"which version served at time T?" has an answer. An entry has the traffic and the settings of the deployment
together, and is only replaced by whoever has read it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from app.config import Serving, faults
from app.errors import UserError
from app.serving.traffic.variants import Deployed
from app.state import database
from app.state.audit import Audit, Changed, Entry

ACTION = "traffic"
"""Action of the audit log's entries with a traffic."""
OFF = "undeploy"
"""Action of the entries by which an endpoint is taken off."""
ACTIONS = (ACTION, OFF)
SETTINGS = "serving"
"""Key of the settings, `app.config.Serving`, in an entry's details."""


class Traffic(BaseModel):
    """An endpoint's variants and how the units are shared among them. At least one variant answers.

    Raises UserError if none has a weight above 0, a shadow has one, or their sum is not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    salt: str
    policy: Literal["weighted", "bandit"]
    variants: dict[str, Deployed]

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        for name, variant in self.variants.items():
            if not 0 <= variant.weight < math.inf:
                raise UserError(f"the weight of {name} must be 0 or more, not {variant.weight}")
            if variant.shadow and variant.weight:
                raise UserError(f"{name} is a shadow: nobody sees its answers, so it takes no weight")
        if not 0 < sum(variant.weight for variant in self.variants.values()) < math.inf:
            raise UserError("at least one variant must have a weight above 0, and the sum must be finite")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Like pydantic's, but the result is checked as well."""
        return type(self)(**{**dict(self), **(update or {})})

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the variants that answer; each is above 0."""
        return {name: v.weight for name, v in self.variants.items() if v.weight > 0}


class Current(NamedTuple):
    """What holds for an endpoint."""

    number: int
    """Number of its entry in the audit log."""
    traffic: Traffic
    serving: Serving | None
    """Settings that it was deployed with; None in an entry of an older Raylway."""


def alone(
    model: str, on_wait: Callable[[str], None] | None = None, *, wait: bool = True
) -> AbstractContextManager[None]:
    """The lock of an endpoint: whoever changes its entry, its replicas and workers holds it meanwhile."""
    return database.alone(f"endpoint {model}", on_wait, wait=wait)


def current(audit: Audit, model: str, at: float | None = None) -> Current | None:
    """What holds, or held at a time (seconds since the epoch); None if the endpoint was not served.

    The order of the entries decides, not their times: a clock may have been set back. Raises UserError if the
    entry cannot be read.
    """
    until = None if at is None or at >= time.time() else at
    entry = audit.last(model, ACTIONS, until)
    return None if entry is None or entry.action == OFF else read(entry)


def read(entry: Entry) -> Current:
    """The content of an entry. Raises UserError if it has none that this version of Raylway reads."""
    details = dict(entry.details)
    settings = details.pop(SETTINGS, None)
    try:
        serving = None if settings is None else Serving.model_validate(settings)
        return Current(entry.number, Traffic.model_validate(details), serving)
    except (ValidationError, UserError) as error:
        first = faults.explained(error.errors()[0]) if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"entry {entry.number} of the audit log, the traffic of {entry.model}, cannot be read: {first}; "
            "deploy it again with `raylway serve`"
        ) from None


def settings(audit: Audit, model: str) -> Serving | None:
    """The settings that an endpoint runs with; None if it is not served."""
    held = current(audit, model)
    return held and held.serving


def change(audit: Audit, model: str, held: Current, traffic: Traffic, who: str | None = None) -> int:
    """Replace what holds, and keep the settings; returns the entry's number. Writes nothing if it holds.

    Raises Changed if `held` does not hold any more.
    """
    if traffic == held.traffic:
        return held.number
    return _write(audit, model, traffic, held.serving, who, expected=held.number).number


@contextlib.contextmanager
def tried(
    audit: Audit,
    model: str,
    traffic: Traffic,
    serving: Serving | None,
    who: str | None = None,
    *,
    expected: int | None = None,
) -> Iterator[int]:
    """Let `traffic` hold while the replicas load it; yields the entry's number.

    If the block fails, what held before holds again, by a new entry, unless somebody has written meanwhile.

    :param expected: number of the entry that `traffic` is a change of; None if it replaces whatever holds.
    :raises Changed: another entry holds.
    """
    before = audit.last(model, ACTIONS)
    if expected is None and before is not None and before.details == _details(traffic, serving):
        yield before.number
        return
    newest = before.number if before else 0
    number = _write(
        audit, model, traffic, serving, who, expected=newest if expected is None else expected
    ).number
    try:
        yield number
    except BaseException:
        with contextlib.suppress(Changed):
            if before is None:
                audit.add(OFF, model, {}, who, expected=number, among=ACTIONS)
            else:
                audit.add(before.action, model, before.details, who, expected=number, among=ACTIONS)
        raise


def take_off(audit: Audit, model: str, who: str | None = None) -> None:
    """Let nothing hold; nothing is written if nothing does."""
    before = audit.last(model, ACTIONS)
    if before is not None and before.action != OFF:
        audit.add(OFF, model, {}, who, expected=before.number, among=ACTIONS)


def reweighted(traffic: Traffic, weights: Mapping[str, float]) -> Traffic:
    """With other weights for some variants. Raises UserError if one is unknown, or none is left above 0."""
    for name in weights:
        if name not in traffic.variants:
            raise UserError(f"there is no variant {name!r}; there are {', '.join(traffic.variants)}")
    variants = {
        name: variant.model_copy(update={"weight": weights.get(name, variant.weight)})
        for name, variant in traffic.variants.items()
    }
    return traffic.model_copy(update={"variants": variants})


def _write(
    audit: Audit,
    model: str,
    traffic: Traffic,
    serving: Serving | None,
    who: str | None,
    *,
    expected: int,
) -> Entry:
    return audit.add(ACTION, model, _details(traffic, serving), who, expected=expected, among=ACTIONS)


def _details(traffic: Traffic, serving: Serving | None) -> dict[str, Any]:
    settings = {} if serving is None else {SETTINGS: serving.model_dump(mode="json")}
    return {**json.loads(traffic.model_dump_json()), **settings}
