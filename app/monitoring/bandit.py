"""Weights of a bandit: Thompson sampling moves units to the variant with the highest mean reward."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from app.errors import UserError
from app.serving.traffic import traffic
from app.serving.traffic.traffic import ACTIONS, Traffic, TrafficEntry, parse
from app.state.audit import Audit, Conflict
from app.state.locks import Busy
from app.state.records import Records

NUM_DRAWS = 10_000
"""Number of draws from the posterior of each variant's mean reward."""
MIN_SHARE = 0.01
"""Minimum share of units per variant, so that a weak variant keeps being measured."""
MIN_SHARE_CHANGE = 0.02
"""Weights are changed only if a share moves by more than this, because each change reassigns units."""
AUTHOR = "raylway (bandit)"
"""Author of the bandit's entries in the audit log."""


@dataclass(frozen=True)
class Rewards:
    """The rewards that clients gave for the predictions of a variant."""

    count: int
    total: float
    """Sum of the rewards; each is from 0 to 1."""


def compute_weights(rewards: Mapping[str, Rewards]) -> dict[str, float]:
    """The weight of each variant, with the sum 1: the probability that it has the highest mean reward.

    The probabilities are scaled so that each weight is at least MIN_SHARE.

    The posterior of a mean is Beta(1 + total, 1 + count - total): Thompson (1933), for rewards from 0 to 1 as
    in Agrawal and Goyal, "Analysis of Thompson Sampling for the multi-armed bandit problem" (COLT 2012).
    With weights, instead of one draw per request, a unit stays with its variant while the weights do. The
    draws are seeded, so the same rewards always give the same weights.
    """
    random = np.random.default_rng(0)
    draws = [random.beta(1 + r.total, 1 + max(r.count - r.total, 0), NUM_DRAWS) for r in rewards.values()]
    wins = np.bincount(np.argmax(draws, axis=0), minlength=len(draws)) / NUM_DRAWS
    shares = MIN_SHARE + (1 - MIN_SHARE * len(draws)) * wins
    return dict(zip(rewards, shares.tolist(), strict=True))


def rebalance(audit: Audit, records: Records, model: str, current: TrafficEntry) -> None:
    """Set the weights of an endpoint by its rewards. Does nothing unless its policy is "bandit".

    Does nothing either if somebody has changed the endpoint since `current` was read; the next round will.
    """
    versions = {name: v.version for name, v in current.traffic.variants.items() if v.weight > 0}
    if current.traffic.policy != "bandit" or len(versions) < 2:
        return
    by_version = records.rewards(model, _comparison_start(audit, model, current.traffic))
    rewards = {name: Rewards(*by_version.get(version, (0, 0.0))) for name, version in versions.items()}
    weights = compute_weights(rewards)
    total = sum(current.traffic.weights.values())
    changes = [abs(weights[name] - weight / total) for name, weight in current.traffic.weights.items()]
    if max(changes) > MIN_SHARE_CHANGE:
        with contextlib.suppress(Conflict, Busy), traffic.endpoint_lock(model, wait=False):
            traffic.update(audit, model, current, traffic.with_weights(current.traffic, weights), AUTHOR)


def _comparison_start(audit: Audit, model: str, current: Traffic) -> float:
    """The time since which the same versions share the same units, in seconds since the epoch."""
    start = time.time()
    for entry in audit.newest_first(model, ACTIONS):
        try:
            previous = parse(entry).traffic
        except UserError:  # an entry of an older Raylway, or one that undeploys the endpoint
            break
        if (previous.salt, _versions(previous)) != (current.salt, _versions(current)):
            break
        # If the clock was set back, an older entry may have a later time.
        start = min(start, entry.at)
    return start


def _versions(traffic: Traffic) -> dict[str, str]:
    """The version of each variant that is not a shadow."""
    return {name: v.version for name, v in traffic.variants.items() if not v.shadow}
