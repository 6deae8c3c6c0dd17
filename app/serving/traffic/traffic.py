"""The traffic of an endpoint: its variants, and the share of units that each one answers.

The model's newest traffic entry in the audit log is the current one. All replicas read it, including those
that start later, and older entries answer "which version served at time T?". An entry holds the traffic and
the settings of the deployment together. Changes are compare-and-set: a writer names the entry it has read.
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
from app.serving.traffic.variants import DeployedVariant
from app.state import locks
from app.state.audit import Audit, Conflict, Entry

TRAFFIC_ACTION = "traffic"
"""Action of the audit log's entries that set a traffic."""
UNDEPLOY_ACTION = "undeploy"
"""Action of the entries that remove an endpoint."""
ACTIONS = (TRAFFIC_ACTION, UNDEPLOY_ACTION)
SETTINGS_KEY = "serving"
"""Key of the settings, `app.config.Serving`, in an entry's details."""


class Traffic(BaseModel):
    """The variants of an endpoint and their weights.

    Raises UserError if a weight is negative, no variant has a weight above 0, a shadow has one, or the sum is
    not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    salt: str
    """Salt of the hash that assigns units to variants."""
    policy: Literal["weighted", "bandit"]
    """Origin of the weights: set by users, or by a bandit."""
    variants: dict[str, DeployedVariant]
    """Variants by name."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for name, variant in self.variants.items():
            if not 0 <= variant.weight < math.inf:
                raise UserError(f"the weight of {name} must be 0 or more, not {variant.weight}")
            if variant.shadow and variant.weight:
                raise UserError(f"{name} is a shadow: clients never get its answers, so its weight must be 0")
        if not 0 < sum(variant.weight for variant in self.variants.values()) < math.inf:
            raise UserError("at least one variant must have a weight above 0, and the sum must be finite")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Like pydantic's `model_copy`, but the copy is validated."""
        return type(self)(**{**dict(self), **(update or {})})

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the variants that answer clients; all are above 0."""
        return {name: v.weight for name, v in self.variants.items() if v.weight > 0}


class TrafficEntry(NamedTuple):
    """The content of an audit log entry that sets a traffic."""

    number: int
    """Number of the entry."""
    traffic: Traffic
    serving: Serving | None
    """Settings of the deployment; None in an entry of an older Raylway."""


def endpoint_lock(
    model: str, on_wait: Callable[[str], None] | None = None, *, wait: bool = True
) -> AbstractContextManager[None]:
    """The lock of an endpoint. Hold it to change the endpoint's traffic, replicas or workers.

    `on_wait` and `wait` are the arguments of `app.state.locks.exclusive`, which raises Busy.
    """
    return locks.exclusive(f"endpoint {model}", on_wait, wait=wait)


def read_current(audit: Audit, model: str, at: float | None = None) -> TrafficEntry | None:
    """Read the current traffic of a model, or the one at a time; None if the endpoint was not deployed.

    Entries are ordered by number, not by time, because clocks may be set back. Raises UserError if the entry
    cannot be read.

    :param at: time in seconds since the epoch; None for now.
    """
    until = None if at is None or at >= time.time() else at
    entry = audit.last(model, ACTIONS, until)
    return None if entry is None or entry.action == UNDEPLOY_ACTION else parse(entry)


def parse(entry: Entry) -> TrafficEntry:
    """Parse an entry of the audit log. Raises UserError if this version of Raylway cannot read it."""
    details = dict(entry.details)
    settings = details.pop(SETTINGS_KEY, None)
    try:
        serving = None if settings is None else Serving.model_validate(settings)
        return TrafficEntry(entry.number, Traffic.model_validate(details), serving)
    except (ValidationError, UserError) as error:
        first = faults.describe(error.errors()[0]) if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"entry {entry.number} of the audit log, the traffic of {entry.model}, cannot be read: {first}; "
            "deploy the model again with `raylway serve`"
        ) from None


def update(audit: Audit, model: str, current: TrafficEntry, traffic: Traffic, who: str | None = None) -> int:
    """Replace the traffic of an endpoint and keep its settings; returns the number of the current entry.

    Nothing is written if the traffic does not change. `who` is the author; None for the user of this process.
    Raises Conflict if `current` is not the newest entry.
    """
    if traffic == current.traffic:
        return current.number
    return _write(audit, model, traffic, current.serving, who, expected=current.number).number


@contextlib.contextmanager
def set_with_rollback(
    audit: Audit,
    model: str,
    traffic: Traffic,
    serving: Serving | None,
    who: str | None = None,
    *,
    expected: int | None = None,
) -> Iterator[int]:
    """Record `traffic` as current while the replicas load it; yields the number of its entry.

    If the block raises, a new entry restores the previous traffic, so that new replicas can load it. An entry
    that somebody else has written in the meantime is left in place.

    :param expected: number of the entry that `traffic` is based on; None to replace any entry.
    :raises Conflict: the newest entry is not the expected one.
    """
    previous = audit.last(model, ACTIONS)
    if expected is None and previous is not None and previous.details == _details(traffic, serving):
        yield previous.number
        return
    newest = previous.number if previous else 0
    number = _write(
        audit, model, traffic, serving, who, expected=newest if expected is None else expected
    ).number
    try:
        yield number
    except BaseException:
        with contextlib.suppress(Conflict):
            if previous is None:
                audit.add(UNDEPLOY_ACTION, model, {}, who, expected=number, among=ACTIONS)
            else:
                audit.add(previous.action, model, previous.details, who, expected=number, among=ACTIONS)
        raise


def record_undeploy(audit: Audit, model: str, who: str | None = None) -> None:
    """Record that an endpoint has no traffic. Nothing is written if it has none."""
    newest = audit.last(model, ACTIONS)
    if newest is not None and newest.action != UNDEPLOY_ACTION:
        audit.add(UNDEPLOY_ACTION, model, {}, who, expected=newest.number, among=ACTIONS)


def with_weights(traffic: Traffic, weights: Mapping[str, float]) -> Traffic:
    """A copy with new weights for some variants. Raises UserError if one is unknown or none is above 0."""
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
    return audit.add(TRAFFIC_ACTION, model, _details(traffic, serving), who, expected=expected, among=ACTIONS)


def _details(traffic: Traffic, serving: Serving | None) -> dict[str, Any]:
    settings = {} if serving is None else {SETTINGS_KEY: serving.model_dump(mode="json")}
    return {**json.loads(traffic.model_dump_json()), **settings}
