import asyncio

import pytest
from starlette.middleware import Middleware

from app.serving.ingress import Guard, middlewares


def ask(headers=(), chunks=(b"",), max_body_bytes=100, kind="http"):
    """What the application behind the guard saw (None if nothing), and what the client was sent."""
    seen, sent = {}, []
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]

    async def app(scope, receive, send):
        seen["headers"] = dict(scope["headers"])
        seen["messages"] = [await receive(), await receive()]

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": "POST", "path": "/", "headers": list(headers)}
    asyncio.run(Guard(app, max_body_bytes)(scope, receive, send))
    return seen or None, sent


def test_serve_is_given_middlewares():
    assert [type(each) for each in middlewares()] == [Middleware]


def test_headers_that_steer_serve_are_stripped_and_others_kept():
    kept = {b"x-request-id": b"r-1", b"x-raylway-unit": "ü".encode(), b"user-agent": b"\xff"}
    steering = [
        b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"X-Session_ID",
        b"serve_multiplexed_model_id", b"serve-multiplexed-model-id",
    ]  # fmt: skip
    seen, sent = ask([*kept.items(), *((name, b"0") for name in steering)])
    assert seen["headers"] == kept
    assert sent == []


@pytest.mark.parametrize("value", [b"", b"a b", b"x" * 65, b"a\tb", "ü".encode()])
def test_a_request_id_that_is_no_short_token_is_dropped(value):
    seen, _ = ask([(b"x-request-id", value)])
    assert seen["headers"] == {}


@pytest.mark.parametrize("name", [b"x-request-id", b"X-Session-Id", b"x-raylway-unit", b"traceparent"])
def test_bytes_that_are_not_utf8_get_400(name):
    seen, sent = ask([(name, b"\xff")])
    assert seen is None
    assert sent[0]["status"] == 400
    assert {b"content-length", b"connection"} <= set(dict(sent[0]["headers"]))


def test_a_body_within_the_limit_comes_through_whole_and_then_the_disconnect():
    seen, sent = ask(chunks=[b"x" * 60, b"y" * 40])
    assert seen["messages"] == [
        {"type": "http.request", "body": b"x" * 60 + b"y" * 40, "more_body": False},
        {"type": "http.disconnect"},
    ]
    assert sent == []


@pytest.mark.parametrize(
    ("headers", "chunks"),
    [([], [b"x" * 101]), ([], [b"x" * 60, b"y" * 41, b""]), ([(b"content-length", b"101")], [b""])],
)
def test_a_larger_body_gets_413(headers, chunks):
    seen, sent = ask(headers, chunks)
    assert seen is None
    assert sent[0]["status"] == 413


def test_a_client_that_leaves_within_its_body_is_reported_as_gone():
    seen, _ = ask(chunks=[])
    assert seen["messages"][0] == {"type": "http.disconnect"}


def test_websockets_are_turned_away():
    seen, sent = ask(kind="websocket")
    assert seen is None
    assert sent == [{"type": "websocket.close"}]
