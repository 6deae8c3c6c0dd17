import asyncio
import logging

import pytest

from app.serving.gateway.haproxy import proofs
from app.serving.gateway.haproxy_config import (
    REQUEST_PROOF_HEADER,
    REQUEST_PROOF_VARIABLE,
    RESPONSE_PROOF_HEADER,
    RESPONSE_PROOF_VARIABLE,
)
from app.serving.gateway.proof import ProofMiddleware
from app.serving.http import Response
from app.serving.logs import log

VALUES = {name: value.encode() for name, value in proofs("0123").items()}


def send_request(headers, secret="0123", kind="http"):
    """The headers that the application got (None if it got no request), and the messages that were sent."""
    received, sent = [], []

    async def app(scope, receive, send):
        received.append(dict(scope.get("headers", ())))
        if scope["type"] == "http":
            await Response(b"{}").send(send, "r-1")

    async def send(message):
        sent.append(message)

    scope = {"type": kind} if kind == "lifespan" else {"type": kind, "headers": headers}
    asyncio.run(ProofMiddleware(app, secret)(scope, None, send))
    return (received[0] if received else None), sent


def test_the_request_proof_is_removed_and_the_response_proof_added():
    received, sent = send_request(
        [(REQUEST_PROOF_HEADER.encode(), VALUES[REQUEST_PROOF_VARIABLE]), (b"a", b"b")]
    )
    assert received == {b"a": b"b"}
    assert dict(sent[0]["headers"])[RESPONSE_PROOF_HEADER.encode()] == VALUES[RESPONSE_PROOF_VARIABLE]


@pytest.mark.parametrize(
    "values", [[], [b""], [b"0123"], [VALUES[RESPONSE_PROOF_VARIABLE]], [VALUES[REQUEST_PROOF_VARIABLE]] * 2]
)
def test_requests_without_exactly_one_valid_proof_get_403_without_a_proof(values):
    received, sent = send_request([(REQUEST_PROOF_HEADER.encode(), value) for value in values])
    assert received is None
    assert sent[0]["status"] == 403
    assert {RESPONSE_PROOF_HEADER.encode(), REQUEST_PROOF_HEADER.encode()}.isdisjoint(
        dict(sent[0]["headers"])
    )


def test_without_a_secret_all_requests_are_refused_and_an_error_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.ERROR, logger=log.name):
        received, sent = send_request([(REQUEST_PROOF_HEADER.encode(), b"")], secret="")
    assert (received, sent[0]["status"]) == (None, 403)
    assert "RAYLWAY_GATEWAY_SECRET must be set" in caplog.text


def test_websockets_are_closed_and_lifespan_messages_pass():
    assert send_request([], kind="websocket") == (None, [{"type": "websocket.close"}])
    assert send_request([], kind="lifespan") == ({}, [])
