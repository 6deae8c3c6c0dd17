import asyncio
import re
from types import SimpleNamespace

import pytest

from app.serving.gateway import guard
from app.serving.gateway.guard import Guard
from app.serving.gateway.haproxy import proofs
from app.serving.gateway.haproxy_config import (
    REQUEST_PROOF_HEADER,
    RESPONSE_PROOF_HEADER,
    UNFINISHED_HEADER,
)
from app.serving.http import Refused, Response
from app.state.home import GATEWAY_SECRET_VARIABLE

REQUEST_PROOF, RESPONSE_PROOF = (value.encode() for value in proofs("0123").values())
SILENT = "silent"
"""A chunk that never arrives."""


class Deployment:
    """Records requests, and reads the body unless the response is an exception."""

    def __init__(self, response=None):
        self.requests = []
        self.response = response or Response(b"{}")

    async def respond(self, request):
        self.requests.append(request)
        if isinstance(self.response, Exception):
            raise self.response
        self.body = await request.body.read(100)
        return self.response


def send_request(headers=(), chunks=(b"",), kind="http", path="/", deployment=None, method="POST"):
    """The request that the deployment got (None if none), and the ASGI messages that the client got."""
    sent, deployment = [], deployment or Deployment()
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]

    async def receive():
        if incoming and incoming[0]["body"] is SILENT:
            await asyncio.Event().wait()
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def serve(scope, receive, send):
        """Stands in for Ray Serve's own application."""
        await send({"type": "serve", "scope": scope, "messages": [await receive(), await receive()]})

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
    guard = Guard(serve, lambda: None if deployment == "none" else deployment, 100)
    asyncio.run(guard(scope, receive, send))
    return (deployment.requests[0] if deployment != "none" and deployment.requests else None), sent


def test_a_process_that_is_no_replica_has_no_deployment():
    middleware, _ = guard.middlewares()
    assert middleware.cls is Guard
    assert middleware.args[0]() is None


@pytest.mark.parametrize("secret", ["0123", ""])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"0123"],
        [REQUEST_PROOF],
        [REQUEST_PROOF] * 2,
        [REQUEST_PROOF, b"x"],
        [RESPONSE_PROOF],
    ],
)
@pytest.mark.parametrize("path", ["/", "/-/healthz", "/v2/models/income/predict"])
def test_in_the_order_of_serve_the_middlewares_accept_only_the_proof(monkeypatch, secret, values, path):
    from ray.serve._private.http_util import _apply_middlewares

    monkeypatch.setenv(GATEWAY_SECRET_VARIABLE, secret)
    scopes, sent = [], []

    async def serve(scope, receive, send):
        scopes.append(scope)
        await Response(b"{}").send(send, "r")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(REQUEST_PROOF_HEADER.encode(), value) for value in values]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    asyncio.run(_apply_middlewares(serve, guard.middlewares())(scope, receive, send))
    proof = dict(sent[0]["headers"]).get(RESPONSE_PROOF_HEADER.encode())
    if secret and values == [REQUEST_PROOF]:
        assert REQUEST_PROOF_HEADER.encode() not in dict(scopes[0]["headers"])
        assert proof == RESPONSE_PROOF
    else:
        assert not scopes
        assert proof is None
        assert sent[0]["status"] == 403


def test_the_deployment_is_looked_up_for_every_request(monkeypatch):
    """Serve listens before it creates the deployment; later requests must take the fast path."""
    ours, other = SimpleNamespace(respond=None), SimpleNamespace()
    contexts = [SimpleNamespace(servable_object=served) for served in (None, ours, other)]
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: contexts[0])
    middleware, _ = guard.middlewares()
    guarded = middleware.cls(None, *middleware.args)
    assert guarded._deployment() is None
    del contexts[0]
    assert guarded._deployment() is ours
    del contexts[0]
    assert guarded._deployment() is None, "other applications get their requests from Serve"


@pytest.fixture
def direct_path(monkeypatch):
    """The direct path of a process in which Serve has not called the middlewares yet."""
    path = guard.DirectPath()
    monkeypatch.setattr(guard, "DIRECT_PATH", path)
    return path


def test_a_replica_reports_that_serve_does_not_call_its_middlewares(direct_path):
    (fault,) = direct_path.faults()
    assert fault.startswith("Ray Serve has not called app.serving.gateway.guard.middlewares")
    guard.middlewares()
    assert direct_path.faults() == []


def test_a_replica_reports_requests_that_miss_the_deployment(direct_path):
    guard.middlewares()
    send_request(deployment="none")
    assert direct_path.faults() == [], "the proxy on the head node has no deployment"
    direct_path.has_deployment = True
    send_request()
    assert direct_path.faults() == []
    _, sent = send_request(deployment="none")
    assert sent[0]["type"] == "serve", "Serve answers the request"
    assert "through Ray Serve instead of directly" in direct_path.faults()[0]


def test_a_response_is_complete_and_has_the_request_id():
    deployment = Deployment(Response(b"x" * 7, 201, {"retry-after": "1"}, "text/plain"))
    request, sent = send_request([(b"x-request-id", b"r-1")], [b"abc"], deployment=deployment)
    assert (request.method, request.path, deployment.body, request.request_id) == ("POST", "/", b"abc", "r-1")
    start, body = sent
    assert (start["status"], dict(start["headers"])) == (
        201,
        {
            b"content-length": b"7", b"content-type": b"text/plain",
            b"x-request-id": b"r-1", b"retry-after": b"1",
        },
    )  # fmt: skip
    assert body == {"type": "http.response.body", "body": b"x" * 7}


def test_headers_that_control_serve_are_removed():
    kept = {b"x-request-id": b"r-1", b"x-raylway-unit": "ü".encode(), b"user-agent": b"\xff"}
    control = [
        b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"X-Session_ID",
        b"serve_multiplexed_model_id", b"serve-multiplexed-model-id",
    ]  # fmt: skip
    request, _ = send_request([*kept.items(), *((name, b"0") for name in control)])
    assert request.headers == kept


@pytest.mark.parametrize("value", [b"", b"a b", b"x" * 65, b"a\tb", "ü".encode()])
def test_an_invalid_request_id_is_replaced(value):
    request, sent = send_request([(b"x-request-id", value)])
    assert re.fullmatch("[0-9a-f]{32}", request.request_id)
    assert dict(sent[0]["headers"])[b"x-request-id"].decode() == request.request_id


@pytest.mark.parametrize("name", [b"x-request-id", b"X-Session-Id", b"x-raylway-unit", b"traceparent"])
def test_headers_that_are_not_utf8_get_400(name):
    request, sent = send_request([(name, b"\xff")])
    assert request is None
    assert sent[0]["status"] == 400
    assert {b"content-length", b"connection"} <= set(dict(sent[0]["headers"]))


@pytest.mark.parametrize(
    ("headers", "chunks"),
    [([], [b"x" * 101]), ([], [b"x" * 60, b"y" * 41, b""]), ([(b"content-length", b"101")], [b""])],
)
def test_a_body_above_the_limit_gets_413(headers, chunks):
    _, sent = send_request(headers, chunks)
    assert sent[0]["status"] == 413


def test_a_refusal_does_not_wait_for_the_body():
    """A refusal by the headers is sent although the body never arrives."""
    refusal = Refused(401, "no token", headers={"www-authenticate": "Bearer"})
    _, (start, content) = send_request([], [b"x", SILENT], deployment=Deployment(refusal))
    headers = dict(start["headers"])
    assert (start["status"], headers[b"www-authenticate"]) == (401, b"Bearer")
    assert (headers[b"connection"], headers[UNFINISHED_HEADER.encode()]) == (b"close", b"1")
    assert b"no token" in content["body"]


def test_a_refusal_after_the_whole_body_keeps_the_connection():
    _, (start, _) = send_request([], [b"x"], deployment=Deployment(Refused(401, "no token")))
    assert b"connection" not in dict(start["headers"])


def test_head_is_answered_like_get_without_the_body():
    deployment = Deployment(Response(b"12345"))
    _, (start, content) = send_request(method="HEAD", deployment=deployment)
    assert (start["status"], dict(start["headers"])[b"content-length"]) == (200, b"5")
    assert content["body"] == b""


@pytest.mark.parametrize("chunks", [[], [b"x", None]])
def test_a_client_that_disconnects_within_its_body_gets_no_answer(chunks):
    incoming = [{"type": "http.request", "body": b"x", "more_body": True} for chunk in chunks if chunk]
    deployment, sent = Deployment(), []

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Guard(deployment, lambda: deployment)(scope, receive, send))
    assert sent == []


def test_an_internal_error_names_the_request_and_not_the_exception():
    _, sent = send_request([(b"x-request-id", b"r-1")], deployment=Deployment(KeyError("x")))
    assert sent[0]["status"] == 500
    assert b"r-1" in sent[1]["body"]
    assert b"KeyError" not in sent[1]["body"]


def test_health_checks_go_to_serve():
    request, sent = send_request([(b"x-session-id", b"s")], path="/-/healthz")
    assert request is None
    assert sent[0]["type"] == "serve"


def test_without_a_deployment_a_cleaned_request_goes_on_to_serve():
    headers = [(b"x-session-id", b"s"), (b"a", b"b")]
    _, (message,) = send_request(headers, [b"x" * 60, b"y"], deployment="none")
    cleaned = dict(message["scope"]["headers"])
    assert set(cleaned) == {b"a", b"x-request-id"}
    assert message["messages"] == [
        {"type": "http.request", "body": b"x" * 60 + b"y", "more_body": False},
        {"type": "http.disconnect"},
    ]


@pytest.mark.parametrize("path", ["/-/routes", "/-/applications"])
def test_other_paths_of_serve_are_hidden(path):
    request, sent = send_request(path=path)
    assert request is None
    assert sent[0]["status"] == 404


def test_websockets_are_closed():
    request, sent = send_request(kind="websocket")
    assert request is None
    assert sent == [{"type": "websocket.close"}]
