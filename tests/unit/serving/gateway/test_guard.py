import asyncio
import re
from types import SimpleNamespace

import pytest

from app.serving.gateway import guard, haproxy
from app.serving.gateway.guard import Guard
from app.serving.gateway.haproxy import PROOF_HEADER, SECRET_HEADER, proofs
from app.serving.http import Refused, Response
from app.state.home import SECRET

SHOWN_VALUE, PROOF_VALUE = (value.encode() for value in proofs("0123").values())
SILENT = "silent"
"""A chunk that never comes."""


class Deployment:
    """Notes what it is asked, and reads the body unless it refuses."""

    def __init__(self, response=None):
        self.seen = []
        self.response = response or Response(b"{}")

    async def respond(self, request):
        self.seen.append(request)
        if isinstance(self.response, Exception):
            raise self.response
        self.body = await request.body.read(100)
        return self.response


def ask(headers=(), chunks=(b"",), kind="http", path="/", deployment=None, method="POST"):
    """What the deployment was asked (None if nothing), and what the client was sent."""
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
        await send(
            {"type": "asked", "by": "Serve", "scope": scope, "messages": [await receive(), await receive()]}
        )

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
    guard = Guard(serve, lambda: None if deployment == "none" else deployment, 100)
    asyncio.run(guard(scope, receive, send))
    return (deployment.seen[0] if deployment != "none" and deployment.seen else None), sent


def test_outside_of_a_replica_there_is_no_deployment():
    middleware, _ = guard.middlewares()
    assert middleware.cls is Guard
    assert middleware.args[0]() is None


@pytest.mark.parametrize("secret", ["0123", ""])
@pytest.mark.parametrize(
    "shown", [[], [b""], [b"0123"], [SHOWN_VALUE], [SHOWN_VALUE] * 2, [SHOWN_VALUE, b"x"], [PROOF_VALUE]]
)
@pytest.mark.parametrize("path", ["/", "/-/healthz", "/v2/models/income/predict"])
def test_as_serve_puts_them_together_only_the_secret_opens(monkeypatch, secret, shown, path):
    from ray.serve._private.http_util import _apply_middlewares

    monkeypatch.setenv(SECRET, secret)
    seen, sent = [], []

    async def serve(scope, receive, send):
        seen.append(scope)
        await Response(b"{}").send(send, "r")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(SECRET_HEADER.encode(), value) for value in shown]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    asyncio.run(_apply_middlewares(serve, guard.middlewares())(scope, receive, send))
    proved = dict(sent[0]["headers"]).get(PROOF_HEADER.encode())
    if secret and shown == [SHOWN_VALUE]:
        assert SECRET_HEADER.encode() not in dict(seen[0]["headers"])
        assert proved == PROOF_VALUE
    else:
        assert not seen
        assert proved is None
        assert sent[0]["status"] == 403


def test_the_deployment_is_found_though_serve_listens_before_it_has_it(monkeypatch):
    """Else every request would take Serve's own way, several times as long."""
    ours, other = SimpleNamespace(respond=None), SimpleNamespace()
    contexts = [SimpleNamespace(servable_object=served) for served in (None, ours, other)]
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: contexts[0])
    middleware, _ = guard.middlewares()
    ours_only = middleware.cls(None, *middleware.args)
    assert ours_only._deployment() is None
    del contexts[0]
    assert ours_only._deployment() is ours
    del contexts[0]
    assert ours_only._deployment() is None, "another application's gets its requests from Serve"


@pytest.fixture
def direct_path(monkeypatch):
    """The path of a process in which Serve has called nothing yet."""
    path = guard.DirectPath()
    monkeypatch.setattr(guard, "DIRECT_PATH", path)
    return path


def test_a_replica_whose_guard_serve_does_not_call_reports_it(direct_path):
    (fault,) = direct_path.faults()
    assert fault.startswith("Ray Serve has not called app.serving.gateway.guard.middlewares")
    guard.middlewares()
    assert direct_path.faults() == []


def test_requests_that_miss_the_deployment_are_reported(direct_path):
    guard.middlewares()
    ask(deployment="none")
    assert direct_path.faults() == [], "the proxy on the head node has no deployment"
    direct_path.has_deployment = True
    ask()
    assert direct_path.faults() == []
    _, sent = ask(deployment="none")
    assert sent[0]["by"] == "Serve", "the request is answered all the same"
    assert "through Ray Serve instead of directly" in direct_path.faults()[0]


def test_the_answer_is_whole_and_has_the_requests_id():
    deployment = Deployment(Response(b"x" * 7, 201, {"retry-after": "1"}, "text/plain"))
    request, sent = ask([(b"x-request-id", b"r-1")], [b"abc"], deployment=deployment)
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


def test_headers_that_steer_serve_are_stripped_and_others_kept():
    kept = {b"x-request-id": b"r-1", b"x-raylway-unit": "ü".encode(), b"user-agent": b"\xff"}
    steering = [
        b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"X-Session_ID",
        b"serve_multiplexed_model_id", b"serve-multiplexed-model-id",
    ]  # fmt: skip
    request, _ = ask([*kept.items(), *((name, b"0") for name in steering)])
    assert request.headers == kept


@pytest.mark.parametrize("value", [b"", b"a b", b"x" * 65, b"a\tb", "ü".encode()])
def test_a_request_id_that_is_no_short_token_is_replaced(value):
    request, sent = ask([(b"x-request-id", value)])
    assert re.fullmatch("[0-9a-f]{32}", request.request_id)
    assert dict(sent[0]["headers"])[b"x-request-id"].decode() == request.request_id


@pytest.mark.parametrize("name", [b"x-request-id", b"X-Session-Id", b"x-raylway-unit", b"traceparent"])
def test_bytes_that_are_not_utf8_get_400(name):
    request, sent = ask([(name, b"\xff")])
    assert request is None
    assert sent[0]["status"] == 400
    assert {b"content-length", b"connection"} <= set(dict(sent[0]["headers"]))


@pytest.mark.parametrize(
    ("headers", "chunks"),
    [([], [b"x" * 101]), ([], [b"x" * 60, b"y" * 41, b""]), ([(b"content-length", b"101")], [b""])],
)
def test_a_body_that_is_too_large_gets_413(headers, chunks):
    _, sent = ask(headers, chunks)
    assert sent[0]["status"] == 413


def test_a_refusal_does_not_wait_for_the_body():
    """A deployment refuses by the headers: the client gets the answer though its body never comes."""
    refusal = Refused(401, "who are you", headers={"www-authenticate": "Bearer"})
    _, (start, content) = ask([], [b"x", SILENT], deployment=Deployment(refusal))
    headers = dict(start["headers"])
    assert (start["status"], headers[b"www-authenticate"]) == (401, b"Bearer")
    assert (headers[b"connection"], headers[haproxy.UNFINISHED_HEADER.encode()]) == (b"close", b"1")
    assert b"who are you" in content["body"]


def test_a_refusal_after_a_whole_body_keeps_the_connection():
    _, (start, _) = ask([], [b"x"], deployment=Deployment(Refused(401, "who are you")))
    assert b"connection" not in dict(start["headers"])


def test_head_is_answered_as_get_without_the_body():
    deployment = Deployment(Response(b"12345"))
    _, (start, content) = ask(method="HEAD", deployment=deployment)
    assert (start["status"], dict(start["headers"])[b"content-length"]) == (200, b"5")
    assert content["body"] == b""


@pytest.mark.parametrize("chunks", [[], [b"x", None]])
def test_a_client_that_leaves_within_its_body_is_told_nothing(chunks):
    incoming = [{"type": "http.request", "body": b"x", "more_body": True} for chunk in chunks if chunk]
    deployment, sent = Deployment(), []

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Guard(deployment, lambda: deployment)(scope, receive, send))
    assert sent == []


def test_a_mistake_of_ours_names_the_request():
    _, sent = ask([(b"x-request-id", b"r-1")], deployment=Deployment(KeyError("x")))
    assert sent[0]["status"] == 500
    assert b"r-1" in sent[1]["body"]
    assert b"KeyError" not in sent[1]["body"]


def test_paths_of_serves_own_are_left_to_it():
    request, sent = ask([(b"x-session-id", b"s")], path="/-/healthz")
    assert request is None
    assert sent[0]["by"] == "Serve"


def test_where_there_is_no_deployment_a_clean_request_goes_on_to_serve():
    headers = [(b"x-session-id", b"s"), (b"a", b"b")]
    _, (asked,) = ask(headers, [b"x" * 60, b"y"], deployment="none")
    given = dict(asked["scope"]["headers"])
    assert set(given) == {b"a", b"x-request-id"}
    assert asked["messages"] == [
        {"type": "http.request", "body": b"x" * 60 + b"y", "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_websockets_are_turned_away():
    request, sent = ask(kind="websocket")
    assert request is None
    assert sent == [{"type": "websocket.close"}]
