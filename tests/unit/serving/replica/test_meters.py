import math

import numpy as np
import pytest

from app.serving.replica.meters import WINDOW_S, Answered, Recent, Tally, at_most, merged


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def asked(seconds, variant="champion", status=200):
    return Answered("predict", variant, status, seconds, 1)


def test_quantiles_are_those_of_the_latencies():
    seconds = np.random.default_rng(0).lognormal(-6, 1, 10_000)
    recent = Recent(Clock())
    recent.add([asked(each) for each in seconds])
    tally = recent.tallies()["champion"]
    assert tally.requests == 10_000
    for quantile in (0.5, 0.99, 0.999):
        assert tally.quantile_s(quantile) == pytest.approx(np.quantile(seconds, quantile), rel=0.06)
    assert math.isnan(Tally().quantile_s(0.5))


def test_errors_are_our_own_and_requests_that_no_variant_got_do_not_count():
    recent = Recent(Clock())
    recent.add([asked(0.1), asked(0.1, status=422), asked(0.1, status=503), asked(0.1, variant="")])
    assert (recent.tallies()["champion"].requests, recent.tallies()["champion"].errors) == (3, 1)
    assert set(recent.tallies()) == {"champion"}


def test_what_is_long_ago_is_forgotten():
    clock = Clock()
    recent = Recent(clock)
    recent.add([asked(0.1)])
    clock.now = WINDOW_S / 2
    recent.add([asked(0.1), asked(0.1, "challenger")])
    clock.now = WINDOW_S + 1
    assert {name: tally.requests for name, tally in recent.tallies().items()} == {
        "champion": 1, "challenger": 1,
    }  # fmt: skip
    clock.now = 2 * WINDOW_S
    assert recent.tallies() == {}


def test_replicas_are_added_up():
    parts = []
    for _ in range(2):
        recent = Recent(Clock())
        recent.add([asked(0.1), asked(0.2, status=500)])
        parts.append(recent.tallies())
    total = merged(parts)["champion"]
    assert (total.requests, total.errors, total.latencies.total()) == (4, 2, 4)


def test_a_bucket_counts_all_that_does_not_exceed_its_bound():
    assert at_most([1, 2, 5, math.inf], [7.0, 2.0, 0.5, 2.1]) == [1, 2, 3, 4]
