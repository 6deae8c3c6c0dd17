"""Weights that move to the variant with the better reward: Thompson sampling."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from app.errors import UserError
from app.serving.traffic import traffic
from app.serving.traffic.traffic import ACTIONS, Traffic, TrafficEntry, parse
from app.state.audit import Audit, Changed
from app.state.database import Busy
from app.state.records import Records

DRAWS = 10_000
FLOOR = 0.01
"""Of the units, what every variant keeps: one that is bad today may be good tomorrow, and is measured on."""

STEP = 0.02
"""Of the units: where no share moves by more, the weights stay, and with them all units."""
WHO = "raylway (bandit)"
"""In the audit log."""


@dataclass(frozen=True)
class Rewards:
    """What feedback brought a variant."""

    count: int
    total: float
    """The sum of rewards from 0 to 1."""


def weights(rewards: Mapping[str, Rewards]) -> dict[str, float]:
    """How probable it is of each variant that its mean reward is the highest; the sum is 1.

    Each mean has the posterior Beta(1 + total, 1 + count - total): Thompson (1933), for rewards between 0 and
    1 as in Agrawal and Goyal, "Analysis of Thompson Sampling for the multi-armed bandit problem" (COLT 2012).
    Units are then shared by these probabilities instead of by a draw for each request, so that a unit stays
    where it is while they do; the draws are seeded, so that all replicas find the same.
    """
    random = np.random.default_rng(0)
    draws = [random.beta(1 + r.total, 1 + max(r.count - r.total, 0), DRAWS) for r in rewards.values()]
    wins = np.bincount(np.argmax(draws, axis=0), minlength=len(draws)) / DRAWS
    shared = FLOOR + (1 - FLOOR * len(draws)) * wins
    return dict(zip(rewards, shared.tolist(), strict=True))


def rebalance(audit: Audit, records: Records, model: str, held: TrafficEntry) -> None:
    """Move the weights of an endpoint whose policy this is to what its rewards say.

    Does nothing if somebody has changed the endpoint since `held`: the next time is soon.
    """
    wanted = held.traffic
    answering = {name: v.version for name, v in wanted.variants.items() if v.weight > 0}
    if wanted.policy != "bandit" or len(answering) < 2:
        return
    found = records.rewards(model, _since(audit, model, wanted))
    rewards = {name: Rewards(*found.get(version, (0, 0.0))) for name, version in answering.items()}
    total = sum(wanted.weights.values())
    moved = weights(rewards)
    if any(abs(moved[name] - weight / total) > STEP for name, weight in wanted.weights.items()):
        with contextlib.suppress(Changed, Busy), traffic.endpoint_lock(model, wait=False):
            traffic.update(audit, model, held, traffic.with_weights(wanted, moved), WHO)


def _since(audit: Audit, model: str, wanted: Traffic) -> float:
    """When these versions began to be compared, seconds since the epoch."""
    begun = time.time()
    for entry in audit.backwards(model, ACTIONS):
        try:
            other = parse(entry).traffic
        except UserError:  # of an older Raylway, or the endpoint was off
            break
        if (other.salt, _versions(other)) != (wanted.salt, _versions(wanted)):
            break
        # The clock may have been set back since an older entry: none of these began after a newer one.
        begun = min(begun, entry.at)
    return begun


def _versions(of: Traffic) -> dict[str, str]:
    return {name: v.version for name, v in of.variants.items() if not v.shadow}
