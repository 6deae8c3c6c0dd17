import asyncio
import math

import pytest
from pydantic import ValidationError

from app.config.serving import Limits
from app.serving.gateway import limits
from app.serving.gateway.limits import Buckets, CentralCount, Limiter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def create_limiters(clock, per_s, num_replicas=1):
    """The limiters of all replicas, and the list of their calls to the central count."""
    buckets, calls = Buckets(clock), []

    async def borrow(*arguments):
        calls.append(arguments)
        return buckets.borrow(*arguments)

    return [Limiter("income", per_s, borrow, clock) for _ in range(num_replicas)], calls


def num_admitted(clock, limiters, seconds, interval_s, principal="bob"):
    """Number of admitted requests of a principal, if one is sent per interval, to all replicas in turn."""

    async def send():
        count, end, turn = 0, clock.now + seconds, 0
        while clock.now < end:
            count += await limiters[turn % len(limiters)].admit(principal) == 0
            turn += 1
            clock.now += interval_s
        return count

    return asyncio.run(send())


@pytest.mark.parametrize("num_replicas", [1, 4])
@pytest.mark.parametrize("per_s", [0.5, 20, 1000])
def test_the_limit_holds_over_all_replicas(clock, num_replicas, per_s):
    limiters, _ = create_limiters(clock, per_s, num_replicas)
    count = num_admitted(clock, limiters, 20, 0.2 / per_s)
    # The first second may be a burst; leases that are not used are lost.
    assert 0.9 * per_s * 20 <= count <= per_s * 21 + 1


def test_requests_below_the_limit_are_all_admitted(clock):
    limiters, _ = create_limiters(clock, 20, 2)
    assert num_admitted(clock, limiters, 20, 0.06) == pytest.approx(20 / 0.06, abs=2)


def test_principals_have_separate_limits(clock):
    (limiter,), _ = create_limiters(clock, 10)
    assert num_admitted(clock, [limiter], 2, 0.001, "greedy") < 40
    assert asyncio.run(limiter.admit("modest")) == 0


def test_models_have_separate_limits(clock):
    buckets = Buckets(clock)

    async def borrow(*arguments):
        return buckets.borrow(*arguments)

    income, flights = (Limiter(model, 10, borrow, clock) for model in ("income", "flights"))
    assert 10 <= num_admitted(clock, [income], 0.1, 0.001) < 100
    assert num_admitted(clock, [flights], 0.01, 0.001) == 10


def test_requests_above_the_limit_rarely_reach_the_central_count(clock):
    (limiter,), calls = create_limiters(clock, 100)
    num_admitted(clock, [limiter], 10, 0.0005)
    assert len(calls) < 300


def test_a_request_is_admitted_after_the_time_to_wait(clock):
    (limiter,), _ = create_limiters(clock, 0.5)
    assert asyncio.run(limiter.admit("bob")) == 0
    wait_s = asyncio.run(limiter.admit("bob"))
    assert wait_s == pytest.approx(2.0)
    clock.now += wait_s + 1e-6
    assert asyncio.run(limiter.admit("bob")) == 0


def test_unused_buckets_are_removed(clock):
    buckets = Buckets(clock)
    for number in range(100):
        buckets.borrow("income", str(number), 1, 1)
    clock.now += 100
    buckets.borrow("income", "late", 1, 1)
    assert set(buckets._buckets) == {("income", "late")}


def test_without_the_central_count_a_replica_counts_on_its_own(clock):
    """A central count that hangs delays one request per FALLBACK_S, and no others."""
    calls = []

    async def time_out(*arguments):
        calls.append(clock.now)
        raise TimeoutError

    limiter = Limiter("income", 10, CentralCount(time_out, clock).borrow, clock)
    count = num_admitted(clock, [limiter], 20, 0.02)
    assert 0.9 * 10 * 20 <= count <= 10 * 21 + 1
    assert len(calls) <= 20 / limits.FALLBACK_S + 1


def test_the_central_count_is_used_again_after_a_failure(clock):
    buckets = Buckets(clock)
    fails = True

    async def borrow(*arguments):
        if fails:
            raise TimeoutError
        return buckets.borrow(*arguments)

    count = CentralCount(borrow, clock)
    asyncio.run(count.borrow("income", "bob", 10, 1))
    fails = False
    clock.now += limits.FALLBACK_S
    asyncio.run(count.borrow("income", "bob", 10, 3))
    assert buckets._buckets["income", "bob"].tokens == 7


def test_a_grant_has_at_most_the_requested_number_of_requests(clock):
    buckets = Buckets(clock)
    assert buckets.borrow("income", "bob", 10, 4) == (4, 0.0)
    assert buckets.borrow("income", "bob", 10, 100) == (6, 0.0)
    grant = buckets.borrow("income", "bob", 10, 1)
    assert (grant.num_requests, grant.wait_s) == (0, pytest.approx(0.1))


@pytest.mark.parametrize("per_s", [0.001, 1e6])
def test_the_smallest_and_the_largest_limit_work(clock, per_s):
    (limiter,), _ = create_limiters(clock, Limits(requests_per_s=per_s).requests_per_s)
    assert asyncio.run(limiter.admit("bob")) == 0
    assert math.ceil(asyncio.run(limiter.admit("bob"))) in (0, 1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"requests_per_s": 1e-310}, {"requests_per_s": 1e300}, {"max_wait_s": 0}, {"max_wait_s": 1e9},
        {"feedback_per_hour": 2**63}, {"feedback_days": 1e300}, {"max_rows": 10**30},
    ],
)  # fmt: skip
def test_limits_outside_the_range_of_their_types_are_refused(settings):
    """1 / 1e-310 is infinite, and a database has no integer 2^63."""
    with pytest.raises(ValidationError):
        Limits.model_validate(settings)
