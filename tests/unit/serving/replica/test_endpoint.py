"""Routing of a request to its action, without Ray and without a server."""

import json
import logging

import pytest

from app.config.serving import Limits
from app.serving.gateway.auth import Principal
from app.serving.http import Refused
from app.serving.replica import actions
from app.serving.replica.endpoint import Endpoint
from tests.bundles import ROWS
from tests.services import loaded, request, run, services

BODY = json.dumps({"rows": ROWS}).encode()


class Authenticator:
    """Has a principal for each token."""

    def __init__(self, **scopes):
        self._scopes = scopes

    def cached(self, authorization):
        return None

    async def principal(self, authorization):
        if authorization not in self._scopes:
            raise Refused(401, "a bearer token is needed")
        return Principal(authorization, frozenset(self._scopes[authorization]), float("inf"))


class Limiter:
    """Admits no request."""

    async def admit(self, principal):
        return 0.4


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("bundles"), champion=50, challenger=50)


def answer(parts, *args, **kwargs):
    return run(Endpoint(parts).respond(request(*args, **kwargs)))


def document(response):
    return json.loads(response.body)


def test_every_action_is_reached_by_its_path(variants):
    parts = services(variants)
    assert document(answer(parts, "", method="GET"))["name"] == "income"
    assert document(answer(parts, "/ready", method="GET"))["ready"]
    assert document(answer(parts, "/openapi.json", method="GET"))["openapi"].startswith("3.0")
    for below in ("", "/versions/1"):
        assert answer(parts, f"{below}/predict", BODY).status == 200
        assert answer(parts, f"{below}/explain", BODY).status == 200
    assert answer(parts, "/infer", b"{}").status == 422
    assert answer(parts, "/feedback", b"{}").status == 404
    counted = [(a.action, a.status) for a in parts.meters.requests]
    assert counted[:4] == [("metadata", 200), ("ready", 200), ("openapi.json", 200), ("predict", 200)]
    assert counted[-2:] == [("infer", 422), ("feedback", 404)]


@pytest.mark.parametrize("path", ["/other", "/predict/x", "/versions/1/feedback", "/versions/1/openapi.json"])
def test_another_path_is_a_404_that_lists_the_actions(variants, path):
    refused = answer(services(variants), path)
    assert refused.status == 404
    assert "GET (metadata), GET /ready" in document(refused)["error"]


def test_another_method_is_a_405(variants):
    refused = answer(services(variants), "/predict", method="GET")
    assert (refused.status, refused.headers) == (405, {"allow": "POST"})


def test_a_version_that_is_not_served_is_a_404(variants):
    for path, method in [
        ("/versions/7/predict", "POST"),
        ("/versions/7", "GET"),
        ("/versions/7/ready", "GET"),
    ]:
        assert answer(services(variants), path, BODY, method=method).status == 404


def test_without_a_valid_token_the_body_is_not_read(variants):
    parts = services(variants, authenticator=Authenticator(ann=["predict"]))
    refused = request("/predict", BODY)
    assert run(Endpoint(parts).respond(refused)).status == 401
    assert not refused.body.is_read
    assert answer(parts, "/predict", BODY, authorization="ann").status == 200
    assert answer(parts, "/ready", method="GET").status == 200, "load balancers have no token"
    assert answer(parts, "/versions/7/ready", method="GET").status == 401


def test_each_action_needs_its_scope(variants):
    parts = services(variants, authenticator=Authenticator(ann=["predict"], eve=["explain", "feedback"]))
    assert answer(parts, "/explain", BODY, authorization="ann").status == 403
    assert answer(parts, "/feedback", b"{}", authorization="ann").status == 403
    assert answer(parts, "/predict", BODY, authorization="eve").status == 403
    assert answer(parts, "/explain", BODY, authorization="eve").status == 200
    assert answer(parts, "/feedback", b"{}", authorization="eve").status == 404


def test_a_forced_variant_needs_the_scope_admin(variants):
    parts = services(variants, authenticator=Authenticator(ann=["predict"], root=["predict", "admin"]))
    for path, headers in [("/versions/2/predict", {}), ("/predict", {"x_raylway_variant": "challenger"})]:
        assert answer(parts, path, BODY, authorization="ann", **headers).status == 403
        forced = answer(parts, path, BODY, authorization="root", **headers)
        assert document(forced)["variant"] == "challenger"
    assert answer(parts, "/versions/2", method="GET", authorization="ann").status == 200, (
        "it predicts nothing"
    )


def test_rate_limited_requests_are_counted_but_not_logged(variants, caplog):
    caplog.set_level(logging.INFO, "ray.serve.raylway")
    parts = services(variants, limiter=Limiter(), limits=Limits(max_rows=8, requests_per_s=5))
    refused = answer(parts, "/predict", BODY)
    assert (refused.status, refused.headers) == (429, {"retry-after": "1"})
    assert [(a.action, a.status) for a in parts.meters.requests] == [("predict", 429)]
    assert caplog.records == []


def test_refused_requests_are_logged_and_others_only_if_the_project_says_so(variants, caplog):
    caplog.set_level(logging.INFO, "ray.serve.raylway")
    parts = services(variants)
    answer(parts, "/predict", BODY)
    assert caplog.records == []
    answer(parts, "/predict", b"{}")
    assert [record.status for record in caplog.records] == [422]
    run(Endpoint(parts, log_requests=True).respond(request("/predict", BODY)))
    assert [(record.status, record.variant) for record in caplog.records[1:]] == [
        (200, variants.choose("r-1"))
    ]


def test_an_unexpected_error_is_counted_and_logged_as_a_500_and_raised(variants, caplog, monkeypatch):
    async def fail(call):
        raise ZeroDivisionError("in an action")

    broken = actions.Action(method="POST", respond=fail, predicts=True)
    monkeypatch.setitem(actions.ACTIONS, "/predict", broken)
    parts = services(variants)
    with pytest.raises(ZeroDivisionError):
        answer(parts, "/predict", BODY)
    assert [a.status for a in parts.meters.requests] == [500]
    caplog.set_level(logging.INFO, "ray.serve.raylway")
    with pytest.raises(ZeroDivisionError):
        answer(parts, "/predict", BODY)
    assert "ZeroDivisionError" in caplog.records[0].error
