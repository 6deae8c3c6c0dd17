"""What stands before every replica: no client header steers Ray Serve, and no body is without limit.

`middlewares` is called by Serve in each process that takes HTTP requests (RAY_SERVE_HTTP_PROXY_CALLBACK_
IMPORT_PATH in app.flags): behind HAProxy these are the replicas themselves.
"""

import re

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.protocol import Refused

MAX_BODY_BYTES = 64 * 1024 * 1024
"""The largest body of any endpoint; `serving.max_body_bytes` sets a lower one for each."""

STEERING = {
    b"x-request-timeout-seconds",  # 0 would switch the server's timeout off
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}
"""Headers by which a client would give orders to Serve, with - for _, as Serve compares them."""
DECODED = STEERING | {b"x-request-id", b"x-raylway-unit", b"traceparent", b"tracestate"}
"""Headers that Serve or an endpoint reads as UTF-8; Serve answers 500 to one that is not."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
"""A client's request id that is taken over; any other is replaced, because it ends up in logs."""


def middlewares() -> list[Middleware]:
    """For Ray Serve: the outermost first."""
    return [Middleware(Guard)]


class Guard:
    """Cleans a request's headers and takes its whole body in before anything else sees it."""

    def __init__(self, app: ASGIApp, max_body_bytes: int = MAX_BODY_BYTES):
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope = {**scope, "headers": _clean(scope["headers"])}
            request = await self._take(scope, receive)
        except Refused as refused:
            # What is left of the body would be read as the connection's next request.
            headers = {"connection": "close"}
            response = Response(refused.body(), refused.status, headers, "application/json")
            await response(scope, receive, send)
            return
        pending: list[Message] = [request]

        async def receive_again() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, receive_again, send)

    async def _take(self, scope: Scope, receive: Receive) -> Message:
        """The whole body as one message, or the news that the client has gone."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if int(declared) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}

    def _too_large(self) -> Refused:
        return Refused(413, f"the body must not exceed {self._max_body_bytes} bytes")


def _clean(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without those that steer Serve. Raises Refused for bytes that are not UTF-8."""
    kept = []
    for name, value in headers:
        plain = name.lower().replace(b"_", b"-")
        if plain in DECODED:
            try:
                value.decode()
            except UnicodeDecodeError:
                raise Refused(400, f"the header {plain.decode()} must be UTF-8") from None
        if plain in STEERING or (plain == b"x-request-id" and not REQUEST_ID.fullmatch(value)):
            continue
        kept.append((name, value))
    return kept
