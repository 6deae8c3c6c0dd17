import asyncio
import math

import pytest
from pydantic import ValidationError

from app.config.serving import Limits
from app.serving.gateway import limits
from app.serving.gateway.limits import Buckets, Counter, Limiter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def limiters(clock, per_s, count=1):
    """The replicas of an endpoint, and how often they asked."""
    buckets, asked = Buckets(clock), []

    async def borrow(*arguments):
        asked.append(arguments)
        return buckets.borrow(*arguments)

    return [Limiter("income", per_s, borrow, clock) for _ in range(count)], asked


def admitted(clock, limiters, seconds, every_s, principal="bob"):
    """How many requests of a principal pass, if they come one after the other to all replicas in turn."""

    async def ask():
        passed, end, turn = 0, clock.now + seconds, 0
        while clock.now < end:
            passed += await limiters[turn % len(limiters)].wait_s(principal) == 0
            turn += 1
            clock.now += every_s
        return passed

    return asyncio.run(ask())


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("per_s", [0.5, 20, 1000])
def test_the_limit_holds_over_all_replicas(clock, replicas, per_s):
    many, _ = limiters(clock, per_s, replicas)
    passed = admitted(clock, many, 20, 0.2 / per_s)
    # A burst of a second at the beginning, and what a replica borrowed and did not use.
    assert 0.9 * per_s * 20 <= passed <= per_s * 21 + 1


def test_who_asks_less_never_waits(clock):
    many, _ = limiters(clock, 20, 2)
    assert admitted(clock, many, 20, 0.06) == pytest.approx(20 / 0.06, abs=2)


def test_one_principal_does_not_pay_for_another(clock):
    (limiter,), _ = limiters(clock, 10)
    assert admitted(clock, [limiter], 2, 0.001, "greedy") < 40
    assert asyncio.run(limiter.wait_s("modest")) == 0


def test_what_one_model_was_asked_leaves_another_its_own_limit(clock):
    buckets = Buckets(clock)

    async def borrow(*arguments):
        return buckets.borrow(*arguments)

    income, flights = (Limiter(model, 10, borrow, clock) for model in ("income", "flights"))
    assert 10 <= admitted(clock, [income], 0.1, 0.001) < 100
    assert admitted(clock, [flights], 0.01, 0.001) == 10


def test_the_count_is_asked_seldom_also_by_those_who_ask_too_much(clock):
    (limiter,), asked = limiters(clock, 100)
    admitted(clock, [limiter], 10, 0.0005)
    assert len(asked) < 300


def test_it_says_when_there_is_another(clock):
    (limiter,), _ = limiters(clock, 0.5)
    assert asyncio.run(limiter.wait_s("bob")) == 0
    wait_s = asyncio.run(limiter.wait_s("bob"))
    assert wait_s == pytest.approx(2.0)
    clock.now += wait_s + 1e-6
    assert asyncio.run(limiter.wait_s("bob")) == 0


def test_who_has_not_come_for_long_is_forgotten(clock):
    buckets = Buckets(clock)
    for number in range(100):
        buckets.borrow("income", str(number), 1, 1)
    clock.now += 100
    buckets.borrow("income", "late", 1, 1)
    assert set(buckets._buckets) == {("income", "late")}


def test_while_nobody_counts_each_replica_does_and_few_wait(clock):
    """The one that counts hangs: a request waits for it every ALONE_S, the others don't."""
    asked = []

    async def hang(*arguments):
        asked.append(clock.now)
        raise TimeoutError

    limiter = Limiter("income", 10, Counter(hang, clock).borrow, clock)
    passed = admitted(clock, [limiter], 20, 0.02)
    assert 0.9 * 10 * 20 <= passed <= 10 * 21 + 1
    assert len(asked) <= 20 / limits.ALONE_S + 1


def test_it_is_asked_again(clock):
    buckets = Buckets(clock)
    away = [True]

    async def ask(*arguments):
        if away[0]:
            raise TimeoutError
        return buckets.borrow(*arguments)

    counter = Counter(ask, clock)
    asyncio.run(counter.borrow("income", "bob", 10, 1))
    away[0] = False
    clock.now += limits.ALONE_S
    asyncio.run(counter.borrow("income", "bob", 10, 3))
    assert buckets._buckets["income", "bob"].tokens == 7


@pytest.mark.parametrize("per_s", [0.001, 1e6])
def test_the_smallest_and_the_largest_limit_can_be_counted(clock, per_s):
    (limiter,), _ = limiters(clock, Limits(requests_per_s=per_s).requests_per_s)
    assert asyncio.run(limiter.wait_s("bob")) == 0
    assert math.ceil(asyncio.run(limiter.wait_s("bob"))) in (0, 1000)


@pytest.mark.parametrize(
    "beyond",
    [
        {"requests_per_s": 1e-310}, {"requests_per_s": 1e300}, {"max_wait_s": 0}, {"max_wait_s": 1e9},
        {"feedback_per_hour": 2**63}, {"feedback_days": 1e300}, {"max_rows": 10**30},
    ],
)  # fmt: skip
def test_a_limit_beyond_what_can_be_counted_is_refused(beyond):
    """1 / 1e-310 is infinite, and 2^63 is no integer of a database."""
    with pytest.raises(ValidationError):
        Limits.model_validate(beyond)
