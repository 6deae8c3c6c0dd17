import time

import numpy as np
import pytest

from app.monitoring.bandit import FLOOR, WHO, Rewards, rebalance, weights
from app.serving.traffic import traffic
from app.serving.traffic.traffic import TRAFFIC_ACTION, Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from app.state.records import Feedback, Prediction, Records, encode
from tests.traffics import place


def test_without_feedback_all_are_alike():
    found = weights({name: Rewards(0, 0.0) for name in "abc"})
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_a_clear_winner_gets_all_but_what_everyone_keeps():
    found = weights({"good": Rewards(1000, 700.0), "bad": Rewards(1000, 300.0)})
    assert found == {"good": pytest.approx(1 - FLOOR), "bad": pytest.approx(FLOOR)}


def test_little_feedback_decides_little():
    found = weights({"good": Rewards(4, 3.0), "bad": Rewards(4, 1.0)})
    # P(Beta(4, 2) > Beta(2, 4)) = 0.896
    assert found["good"] == pytest.approx(FLOOR + (1 - 2 * FLOOR) * 0.896, abs=0.02)


def test_it_is_the_same_everywhere():
    rewards = {"a": Rewards(30, 11.5), "b": Rewards(40, 18.0)}
    assert weights(rewards) == weights(dict(rewards))


def test_it_finds_the_best_and_loses_little_on_the_way():
    random, chances = np.random.default_rng(1), {"a": 0.4, "b": 0.5, "c": 0.6}
    counts, totals = dict.fromkeys(chances, 0), dict.fromkeys(chances, 0.0)
    for _ in range(60):
        shares = weights({n: Rewards(counts[n], totals[n]) for n in chances})
        for name, share in shares.items():
            asked = int(random.binomial(100, share))
            counts[name] += asked
            totals[name] += random.binomial(asked, chances[name])
    assert counts["c"] > 0.6 * sum(counts.values())


def serving(**weights_):
    variants = {
        name: DeployedVariant(version=str(n), weight=weight, path="/nowhere", shadow=not weight)
        for n, (name, weight) in enumerate(weights_.items(), start=1)
    }
    return Traffic(salt="1", policy="bandit", variants=variants)


def asked(records, version, rewards, role="served", at=None):
    """Predictions of a version, each with its reward."""
    at = at or time.time()
    for number, reward in enumerate(rewards):
        key = f"{version}-{role}-{number}-{at}"
        made = Prediction("income", key, "v", version, role, "u", "bob", at, 0.1, [{}], [{}])
        records.add([encode(made)])
        records.judge([Feedback("income", key, {"reward": reward}, "bob", at, "bob", at)], per_hour=10_000)


def test_weights_follow_the_rewards_of_the_versions_that_are_compared():
    audit, records = Audit(), Records()
    asked(records, "2", [1.0] * 50, at=time.time() - 1000)  # before these versions were compared
    place(audit, "income", serving(a=1, b=1, c=0))
    asked(records, "1", [1.0] * 30)
    asked(records, "2", [0.0] * 30)
    asked(records, "2", [1.0] * 50, role="forced")
    asked(records, "3", [1.0] * 50)
    began = traffic.read_current(audit, "income")
    rebalance(audit, records, "income", began)
    held = traffic.read_current(audit, "income")
    assert held.traffic.weights == {"a": pytest.approx(1 - FLOOR), "b": pytest.approx(FLOOR)}
    assert audit.entries()[-1].who == WHO
    rebalance(audit, records, "income", held)
    assert traffic.read_current(audit, "income") == held, "nothing moved, so nothing is written"
    rebalance(audit, records, "income", began)
    assert traffic.read_current(audit, "income") == held, "what was read before is not written over it"


def test_an_entry_that_cannot_be_read_ends_the_look_back():
    audit, records = Audit(), Records()
    audit.add(TRAFFIC_ACTION, "income", {"of": "an older version"})
    place(audit, "income", serving(a=1, b=1))
    asked(records, "1", [1.0] * 30)
    asked(records, "2", [0.0] * 30)
    rebalance(audit, records, "income", traffic.read_current(audit, "income"))
    assert traffic.read_current(audit, "income").traffic.weights["a"] == pytest.approx(1 - FLOOR)


def test_weights_that_people_set_are_left_alone():
    audit, records = Audit(), Records()
    place(audit, "income", serving(a=9, b=1).model_copy(update={"policy": "weighted"}))
    rebalance(audit, records, "income", traffic.read_current(audit, "income"))
    assert len(audit.entries()) == 1
