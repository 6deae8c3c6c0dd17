import time

import numpy as np
import pytest

from app.monitoring.bandit import AUTHOR, MIN_SHARE, Rewards, compute_weights, rebalance
from app.serving.traffic import traffic
from app.serving.traffic.traffic import TRAFFIC_ACTION, Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from app.state.feedback import Feedback
from app.state.records import Prediction, Records, encode
from tests.traffics import place


def test_without_rewards_all_weights_are_equal():
    weights = compute_weights({name: Rewards(0, 0.0) for name in "abc"})
    assert sum(weights.values()) == pytest.approx(1)
    assert list(weights.values()) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_a_clear_winner_gets_all_units_but_the_minimum_shares():
    weights = compute_weights({"good": Rewards(1000, 700.0), "bad": Rewards(1000, 300.0)})
    assert weights == {"good": pytest.approx(1 - MIN_SHARE), "bad": pytest.approx(MIN_SHARE)}


def test_few_rewards_move_the_weights_by_the_exact_probability():
    weights = compute_weights({"good": Rewards(4, 3.0), "bad": Rewards(4, 1.0)})
    # P(Beta(4, 2) > Beta(2, 4)) = 0.896
    assert weights["good"] == pytest.approx(MIN_SHARE + (1 - 2 * MIN_SHARE) * 0.896, abs=0.02)


def test_the_same_rewards_give_the_same_weights():
    rewards = {"a": Rewards(30, 11.5), "b": Rewards(40, 18.0)}
    assert compute_weights(rewards) == compute_weights(dict(rewards))


def test_the_best_variant_gets_most_requests_while_it_is_being_found():
    random, means = np.random.default_rng(1), {"a": 0.4, "b": 0.5, "c": 0.6}
    counts, totals = dict.fromkeys(means, 0), dict.fromkeys(means, 0.0)
    for _ in range(60):
        weights = compute_weights({n: Rewards(counts[n], totals[n]) for n in means})
        for name, weight in weights.items():
            num_requests = int(random.binomial(100, weight))
            counts[name] += num_requests
            totals[name] += random.binomial(num_requests, means[name])
    assert counts["c"] > 0.6 * sum(counts.values())


def make_traffic(**weights):
    """A bandit's traffic with versions 1, 2, ... in this order; a weight of 0 makes a shadow."""
    variants = {
        name: DeployedVariant(version=str(n), weight=weight, path="/nowhere", shadow=not weight)
        for n, (name, weight) in enumerate(weights.items(), start=1)
    }
    return Traffic(salt="1", policy="bandit", variants=variants)


def record(records, version, rewards, role="served", at=None):
    """Record a prediction of a version for each reward, and the reward."""
    at = at or time.time()
    for number, reward in enumerate(rewards):
        request_id = f"{version}-{role}-{number}-{at}"
        prediction = Prediction("income", request_id, "v", version, role, "u", "bob", at, 0.1, [{}], [{}])
        records.add([encode(prediction)])
        feedback = Feedback("income", request_id, {"reward": reward}, "bob", at, "bob", at)
        records.add_feedback([feedback], per_hour=10_000)


def test_weights_follow_the_rewards_since_the_versions_are_compared():
    audit, records = Audit(), Records()
    record(records, "2", [1.0] * 50, at=time.time() - 1000)  # before the comparison starts
    place(audit, "income", make_traffic(a=1, b=1, c=0))
    record(records, "1", [1.0] * 30)
    record(records, "2", [0.0] * 30)
    record(records, "2", [1.0] * 50, role="forced")
    record(records, "3", [1.0] * 50)
    first = traffic.read_current(audit, "income")
    rebalance(audit, records, "income", first)
    second = traffic.read_current(audit, "income")
    assert second.traffic.weights == {"a": pytest.approx(1 - MIN_SHARE), "b": pytest.approx(MIN_SHARE)}
    assert audit.entries()[-1].who == AUTHOR
    rebalance(audit, records, "income", second)
    assert traffic.read_current(audit, "income") == second, "weights that do not change are not written"
    rebalance(audit, records, "income", first)
    assert traffic.read_current(audit, "income") == second, "a change based on an older entry is not written"


def test_the_comparison_starts_after_an_entry_that_cannot_be_read():
    audit, records = Audit(), Records()
    audit.add(TRAFFIC_ACTION, "income", {"of": "an older version"})
    place(audit, "income", make_traffic(a=1, b=1))
    record(records, "1", [1.0] * 30)
    record(records, "2", [0.0] * 30)
    rebalance(audit, records, "income", traffic.read_current(audit, "income"))
    assert traffic.read_current(audit, "income").traffic.weights["a"] == pytest.approx(1 - MIN_SHARE)


def test_weights_of_another_policy_are_not_changed():
    audit, records = Audit(), Records()
    place(audit, "income", make_traffic(a=9, b=1).model_copy(update={"policy": "weighted"}))
    rebalance(audit, records, "income", traffic.read_current(audit, "income"))
    assert len(audit.entries()) == 1
