import math

import numpy as np
import pytest

from app.serving.replica import meters
from app.serving.replica.meters import (
    WINDOW_S,
    CompletedRequest,
    Meters,
    RecentRequests,
    RequestStats,
    cumulative_counts,
    merge,
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def completed(seconds, variant="champion", status=200, num_rows=1):
    return CompletedRequest("predict", variant, status, seconds, num_rows)


def test_quantiles_are_accurate_to_five_percent():
    seconds = np.random.default_rng(0).lognormal(-6, 1, 10_000)
    recent = RecentRequests(Clock())
    recent.add([completed(s) for s in seconds])
    stats = recent.by_variant()["champion"]
    assert stats.num_requests == 10_000
    for quantile in (0.5, 0.99, 0.999):
        assert stats.quantile_s(quantile) == pytest.approx(np.quantile(seconds, quantile), rel=0.06)
    assert math.isnan(RequestStats().quantile_s(0.5))


def test_only_server_errors_count_as_errors_and_requests_without_a_variant_are_left_out():
    recent = RecentRequests(Clock())
    requests = [completed(0.1), completed(0.1, status=422), completed(0.1, status=503)]
    recent.add([*requests, completed(0.1, variant="")])
    (stats,) = recent.by_variant().values()
    assert (stats.num_requests, stats.num_errors) == (3, 1)


def test_requests_leave_the_window():
    clock = Clock()
    recent = RecentRequests(clock)
    recent.add([completed(0.1)])
    clock.now = WINDOW_S / 2
    recent.add([completed(0.1), completed(0.1, "challenger")])
    clock.now = WINDOW_S + 1
    assert {name: stats.num_requests for name, stats in recent.by_variant().items()} == {
        "champion": 1, "challenger": 1,
    }  # fmt: skip
    clock.now = 2 * WINDOW_S
    assert recent.by_variant() == {}


def test_statistics_of_replicas_are_added():
    parts = []
    for _ in range(2):
        recent = RecentRequests(Clock())
        recent.add([completed(0.1), completed(0.2, status=500)])
        parts.append(recent.by_variant())
    total = merge(parts)["champion"]
    assert (total.num_requests, total.num_errors, total.latencies.total()) == (4, 2, 4)


def test_a_bucket_counts_all_values_up_to_its_bound():
    assert cumulative_counts([1, 2, 5, math.inf], [7.0, 2.0, 0.5, 2.1]) == [1, 2, 3, 4]


class FakeMetric:
    """A counter or gauge of Ray's: keeps the values by tags."""

    def __init__(self, name, description="", tag_keys=()):
        self.name, self.tag_keys, self.values = name, set(tag_keys), {}

    def _key(self, tags):
        assert set(tags) == self.tag_keys
        return tuple(sorted(tags.items()))

    def inc(self, value, tags):
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0) + value

    def set(self, value, tags):
        self.values[self._key(tags)] = value


@pytest.fixture
def metrics(monkeypatch):
    """Values by metric and tags, instead of Ray's metrics."""
    created = {}

    def create(name, *arguments, **options):
        created[name] = FakeMetric(name, *arguments, **options)
        return created[name]

    monkeypatch.setattr("ray.util.metrics.Counter", create)
    monkeypatch.setattr("ray.util.metrics.Gauge", create)
    return created


def test_a_report_adds_the_buffered_requests_once(metrics):
    endpoint = Meters("income")
    endpoint.observe(completed(0.004, num_rows=3))
    endpoint.observe(completed(0.3, num_rows=3))
    endpoint.observe(completed(0.001, variant="", status=404, num_rows=0))
    endpoint.report(7, {"champion": 3.0, "challenger": 1.0})
    endpoint.report(7, {"champion": 3.0, "challenger": 1.0})
    champion = {"model": "income", "variant": "champion", "action": "predict", "status": "200"}
    assert metrics[meters.REQUESTS].values[tuple(sorted(champion.items()))] == 2
    assert sum(metrics[meters.REQUESTS].values.values()) == 3
    buckets = metrics[f"{meters.LATENCY}_bucket"].values
    by_bound = {dict(key)["le"]: count for key, count in buckets.items() if dict(key)["status"] == "200"}
    assert (by_bound["0.005"], by_bound["0.2"], by_bound["0.5"], by_bound["+Inf"]) == (1, 1, 2, 2)
    assert sum(metrics[f"{meters.ROWS}_sum"].values.values()) == 6
    assert list(metrics[meters.DROPPED].values.values()) == [7]
    shares = {dict(key)["variant"]: share for key, share in metrics[meters.SHARE].values.items()}
    assert shares == {"champion": 0.75, "challenger": 0.25}
    assert endpoint.recent.by_variant()["champion"].num_requests == 2


def test_a_variant_that_is_removed_has_no_share(metrics):
    endpoint = Meters("income")
    endpoint.report(0, {"champion": 1.0, "challenger": 1.0})
    endpoint.report(0, {"champion": 1.0})
    shares = {dict(key)["variant"]: share for key, share in metrics[meters.SHARE].values.items()}
    assert shares == {"champion": 1, "challenger": 0}


def test_the_buffer_is_bounded(metrics, monkeypatch):
    monkeypatch.setattr(meters, "MAX_BUFFERED_REQUESTS", 2)
    endpoint = Meters("income")
    for _ in range(5):
        endpoint.observe(completed(0.1))
    endpoint.report(0, {"champion": 1.0})
    assert sum(metrics[meters.REQUESTS].values.values()) == 2
