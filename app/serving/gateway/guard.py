"""What stands before every deployment: no client header steers Ray Serve, and no body is read before the
deployment asks for it.

`middlewares` is called by Serve in each process that takes HTTP requests (see app.cluster.flags): behind
HAProxy these are the replicas themselves. There a request goes from the HTTP server straight to the
deployment: Serve's own way to it (three tasks, two contexts and a dozen metrics for each request) takes
several times as long as a small model does.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import starlette.requests
import starlette.responses
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.gateway.body import ReceivedBody, StreamedBody, UnfinishedBodies
from app.serving.gateway.haproxy import MAX_BODY_BYTES, UNFINISHED_HEADER
from app.serving.gateway.proof import ProofMiddleware
from app.serving.http import CLIENT_GONE, Refused, Request, Responder, Response, new_request_id
from app.serving.logs import log
from app.state.home import SECRET

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
UNFINISHED = {"connection": "close", UNFINISHED_HEADER: "1"}
"""Headers of an answer that is given before the whole body has arrived: HAProxy then ends the request instead
of waiting for the rest, which would keep one of the replica's places."""
HEALTH = "/-/healthz"
"""Where HAProxy asks whether a replica is healthy. What else Serve tells is nobody's business."""


class DirectPath:
    """How requests get from the HTTP server of this process to its deployment: directly, or through Serve."""

    def __init__(self) -> None:
        self.is_guarded = False
        """Whether Serve has called `middlewares`."""
        self.has_deployment = False
        """Whether a deployment of ours runs in this process, which the guard calls directly."""
        self.num_missed = 0
        """Requests that the guard handed to Serve although the deployment runs."""

    def faults(self) -> list[str]:
        """Reasons why requests do not take the direct path."""
        faults = []
        if not self.is_guarded:
            faults.append(
                f"Ray Serve has not called {__name__}.middlewares: requests reach the replica unguarded, "
                "or not at all"
            )
        if self.num_missed:
            faults.append(
                "requests go through Ray Serve instead of directly to the deployment, which takes several "
                "times as long"
            )
        return faults


DIRECT_PATH = DirectPath()
"""That of this process. Serve calls `middlewares` by its path, so that nothing can be handed to it."""


def middlewares() -> list[Middleware]:
    """For Ray Serve, which wraps each in the next: the outermost is the last."""
    DIRECT_PATH.is_guarded = True
    return [Middleware(Guard, _deployment), Middleware(ProofMiddleware, os.environ.get(SECRET, ""))]


class Guard:
    """Cleans a request's headers and hands it to the replica's deployment, which asks for the body.

    Where there is none of ours, as in the proxy that Serve keeps on the head node for when no replica runs,
    the request goes on to Serve, with its whole body.
    """

    def __init__(
        self,
        app: ASGIApp,
        deployment: Callable[[], Responder | None] = lambda: None,
        max_body_bytes: int = MAX_BODY_BYTES,
        room: UnfinishedBodies | None = None,
    ):
        """`deployment` is called for each request: Serve begins to listen before there is one."""
        self._app = app
        self._deployment = deployment
        self._max_body_bytes = max_body_bytes
        self._room = room or UnfinishedBodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http" or scope["path"] == HEALTH:
            await self._app(scope, receive, send)
            return
        request_id, body = "", None
        try:
            if scope["path"].startswith(OF_SERVE):
                raise Refused(404, "no such path")
            headers = _clean(scope["headers"])
            request_id = headers.get(b"x-request-id", b"").decode()
            request_id = request_id or new_request_id()
            body = StreamedBody(headers, receive, self._room)
            deployment = self._deployment()
            if deployment is None:
                DIRECT_PATH.num_missed += DIRECT_PATH.has_deployment
                headers[b"x-request-id"] = request_id.encode()
                content = await body.read(self._max_body_bytes)
                await self._app({**scope, "headers": list(headers.items())}, _once(content, receive), send)
                return
            response = await deployment.respond(
                Request(scope["method"], scope["path"], headers, body, request_id)
            )
        except Refused as refused:
            response = Response.from_refusal(refused)
        except Exception:
            log.exception("request %s failed", request_id)
            error = f"this is our mistake, not yours; the log says more of the request {request_id}"
            response = Response(Refused(500, error).body(), 500)
        if response.status == CLIENT_GONE:
            return
        if body is None or not await body.complete():
            # The rest of the body would be read as the connection's next request.
            response = replace(response, headers={**response.headers, **UNFINISHED})
        await response.send(send, request_id or new_request_id(), scope["method"])


def _deployment() -> Responder | None:
    """The object that answers in this process, if it is a replica of ours. Other applications of Ray Serve on
    the cluster get their requests from Serve."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        servable: Any = serve.get_replica_context().servable_object
    except RayServeException:  # this process is no replica
        return None
    return servable if hasattr(servable, "respond") else None


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


async def through_serve(
    deployment: Responder, request: starlette.requests.Request
) -> starlette.responses.Response:
    """Answer a request that Serve's own proxy on the head node passes on when no replica listens.

    `Guard` has run in that proxy, so the headers are clean and the body has been read.
    """
    headers = dict(request.headers.raw)
    request_id = headers[b"x-request-id"].decode()
    body = ReceivedBody(await request.body())
    try:
        response = await deployment.respond(
            Request(request.method, request.scope["path"], headers, body, request_id)
        )
    except Refused as refused:
        response = Response.from_refusal(refused)
    return starlette.responses.Response(
        response.body, response.status, dict(response.headers), response.media_type
    )
