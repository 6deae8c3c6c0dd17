"""What stands before every deployment: no client header steers Ray Serve, and no body is without limit.

`middlewares` is called by Serve in each process that takes HTTP requests (RAY_SERVE_HTTP_PROXY_CALLBACK_
IMPORT_PATH in app.flags): behind HAProxy these are the replicas themselves. There a request goes from the
HTTP server straight to the deployment: Serve's own way to it (three tasks, two contexts and a dozen metrics
for each request) takes several times as long as a small model does.
"""

import re
from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.front import MAX_BODY_BYTES
from app.serving.http import Request, Responder, Response, new_request_id
from app.serving.logs import log
from app.serving.protocol import Refused

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
OF_SERVE = "/-/"
"""Paths below this are Serve's own."""
HEALTH = "/-/healthz"
"""Where HAProxy asks whether a replica is healthy. What else Serve tells is nobody's business."""


def middlewares() -> list[Middleware]:
    """For Ray Serve: the outermost first."""
    return [Middleware(Guard, _deployment)]


class Guard:
    """Cleans a request's headers, takes its whole body in, and hands it to the replica's deployment.

    Where there is none, as in the proxy that Serve keeps on the head node for when no replica runs, it goes
    on to Serve.
    """

    def __init__(
        self,
        app: ASGIApp,
        deployment: Callable[[], Responder | None] = lambda: None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ):
        """`deployment` is asked at each request: Serve begins to listen before it has one to show."""
        self._app = app
        self._deployment = deployment
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http" or scope["path"] == HEALTH:
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(OF_SERVE):
            await Response(Refused(404, "no such path").body(), 404).send(send, new_request_id())
            return
        request_id = ""
        try:
            headers = _clean(scope["headers"])
            request_id = headers.get(b"x-request-id", b"").decode() or new_request_id()
            body = await self._take(headers, receive)
        except Refused as refused:
            # What is left of the body would be read as the connection's next request.
            response = Response(refused.body(), refused.status, {"connection": "close"})
            await response.send(send, request_id or new_request_id())
            return
        if body is None:
            return  # the client has gone
        deployment = self._deployment()
        if deployment is None:
            headers[b"x-request-id"] = request_id.encode()
            await self._app({**scope, "headers": list(headers.items())}, _once(body, receive), send)
            return
        request = Request(scope["method"], scope["path"], headers, body, request_id)
        try:
            response = await deployment.respond(request)
        except Exception:
            log.exception("request %s failed", request_id)
            error = f"this is our mistake, not yours; the log says more of the request {request_id}"
            response = Response(Refused(500, error).body(), 500)
        await response.send(send, request_id)

    async def _take(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, or None if the client has gone. Raises Refused if it is too large."""
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            raise self._too_large()
        message = await receive()
        if message["type"] != "http.request":
            return None
        if not message.get("more_body", False) and len(message["body"]) <= self._max_body_bytes:
            return message["body"]
        body = bytearray(message["body"])
        while message.get("more_body", False):
            if len(body) > self._max_body_bytes:
                break
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        return bytes(body)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body must not exceed {self._max_body_bytes} bytes")


def _deployment() -> Responder | None:
    """The object that answers in this process, if it is a replica."""
    from ray.serve.context import _get_internal_replica_context

    context = _get_internal_replica_context()
    return None if context is None else context.servable_object


def _once(body: bytes, receive: Receive) -> Receive:
    """The body again, as one message."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return pending.pop() if pending else await receive()

    return receive_again


def _clean(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The headers without those that steer Serve. Raises Refused for bytes that are not UTF-8."""
    kept = {}
    for name, value in headers:
        plain = name.lower().replace(b"_", b"-")
        if plain in DECODED:
            try:
                value.decode()
            except UnicodeDecodeError:
                raise Refused(400, f"the header {plain.decode()} must be UTF-8") from None
            if plain in STEERING or (plain == b"x-request-id" and not REQUEST_ID.fullmatch(value)):
                continue
        kept[name] = value
    return kept
