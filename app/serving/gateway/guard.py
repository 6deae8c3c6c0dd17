"""ASGI middleware in front of all deployments: cleans headers, and leaves bodies unread until needed.

Client headers that control Ray Serve are removed. Serve calls `middlewares` in all processes that accept HTTP
requests (`app.cluster.flags`); behind HAProxy these are the replicas. In a replica of Raylway, a request goes
directly from the HTTP server to the deployment: Serve's own path (three tasks, two contexts and a dozen
metrics per request) takes several times as long as a small model.
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
from app.serving.gateway.bounds import MAX_BODY_BYTES
from app.serving.gateway.haproxy_config import UNFINISHED_HEADER
from app.serving.gateway.proof import ProofMiddleware
from app.serving.http import CLIENT_GONE, Refused, Request, Responder, Response, new_request_id
from app.serving.logs import log
from app.state.home import GATEWAY_SECRET_VARIABLE

CONTROL_HEADERS = {
    b"x-request-timeout-seconds",  # 0 would disable the server's timeout
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}
"""Headers that control Serve. Serve treats _ and - in their names alike."""
DECODED_HEADERS = CONTROL_HEADERS | {b"x-request-id", b"x-raylway-unit", b"traceparent", b"tracestate"}
"""Headers that Serve or an endpoint decodes as UTF-8; Serve answers invalid UTF-8 with 500."""
REQUEST_ID_PATTERN = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
"""Pattern of a client's request id that is kept. Any other is replaced, because request ids are logged."""
SERVE_PREFIX = "/-/"
"""Prefix of Serve's own paths. All but HEALTH_PATH are hidden, because they describe the applications."""
HEALTH_PATH = "/-/healthz"
"""Path of HAProxy's health checks."""
UNFINISHED_HEADERS = {"connection": "close", UNFINISHED_HEADER: "1"}
"""Headers of a response that is sent before the whole body has arrived. HAProxy then ends the request instead
of waiting for the rest, which would occupy one of the replica's places."""


class DirectPath:
    """Whether requests go directly from the HTTP server of this process to its deployment."""

    def __init__(self) -> None:
        self.is_guarded = False
        """Whether Serve has called `middlewares`."""
        self.has_deployment = False
        """Whether a deployment of Raylway runs in this process. The guard calls it directly."""
        self.num_missed = 0
        """Number of requests that the guard passed to Serve although the deployment runs."""

    def faults(self) -> list[str]:
        """Reasons why requests do not go directly to the deployment; empty if they do."""
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
"""State of this process. It is global because Serve calls `middlewares` by name, without arguments."""


def middlewares() -> list[Middleware]:
    """The middlewares for Ray Serve, from the innermost to the outermost."""
    DIRECT_PATH.is_guarded = True
    return [
        Middleware(Guard, _deployment),
        Middleware(ProofMiddleware, os.environ.get(GATEWAY_SECRET_VARIABLE, "")),
    ]


class Guard:
    """Cleans the headers of a request and passes it to the deployment of this process, which reads the body.

    In a process without a deployment of Raylway, it passes the request with its whole body to Serve. An
    example is the proxy on the head node, which Serve uses while no replica runs.
    """

    def __init__(
        self,
        app: ASGIApp,
        deployment: Callable[[], Responder | None] = lambda: None,
        max_body_bytes: int = MAX_BODY_BYTES,
        unfinished: UnfinishedBodies | None = None,
    ):
        """`deployment` is called for every request, because Serve listens before the deployment exists."""
        self._app = app
        self._deployment = deployment
        self._max_body_bytes = max_body_bytes
        self._unfinished = unfinished or UnfinishedBodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http" or scope["path"] == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        request_id, body = "", None
        try:
            if scope["path"].startswith(SERVE_PREFIX):
                raise Refused(404, "no such path")
            headers = _clean(scope["headers"])
            request_id = headers.get(b"x-request-id", b"").decode()
            request_id = request_id or new_request_id()
            body = StreamedBody(headers, receive, self._unfinished)
            deployment = self._deployment()
            if deployment is None:
                DIRECT_PATH.num_missed += DIRECT_PATH.has_deployment
                headers[b"x-request-id"] = request_id.encode()
                content = await body.read(self._max_body_bytes)
                await self._app({**scope, "headers": list(headers.items())}, _replay(content, receive), send)
                return
            response = await deployment.respond(
                Request(scope["method"], scope["path"], headers, body, request_id)
            )
        except Refused as refusal:
            response = Response.from_refusal(refusal)
        except Exception:
            log.exception("request %s failed", request_id)
            error = f"internal error; the server's log has details of the request {request_id}"
            response = Response(Refused(500, error).body(), 500)
        if response.status == CLIENT_GONE:
            return
        if body is None or not await body.is_complete():
            # Otherwise the server would parse the rest of the body as the next request of the connection.
            response = replace(response, headers={**response.headers, **UNFINISHED_HEADERS})
        await response.send(send, request_id or new_request_id(), scope["method"])


def _deployment() -> Responder | None:
    """The deployment that runs in this process; None if it does not belong to Raylway.

    Other applications on the cluster get their requests from Serve.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        servable: Any = serve.get_replica_context().servable_object
    except RayServeException:  # this process is no replica
        return None
    return servable if hasattr(servable, "respond") else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI receive function that returns again, as one message, a body that has been read."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_or_replay() -> Message:
        return pending.pop() if pending else await receive()

    return receive_or_replay


def _clean(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The headers without CONTROL_HEADERS and invalid request ids.

    Raises Refused with 400 if one of DECODED_HEADERS is not UTF-8.
    """
    cleaned = {}
    for name, value in headers:
        normalized = name.lower().replace(b"_", b"-")
        if normalized in DECODED_HEADERS:
            try:
                value.decode()
            except UnicodeDecodeError:
                raise Refused(400, f"the header {normalized.decode()} must be UTF-8") from None
            is_request_id = normalized == b"x-request-id"
            if normalized in CONTROL_HEADERS or (is_request_id and not REQUEST_ID_PATTERN.fullmatch(value)):
                continue
        cleaned[name] = value
    return cleaned


async def through_serve(
    deployment: Responder, request: starlette.requests.Request
) -> starlette.responses.Response:
    """Answer a request that comes from Serve's own proxy on the head node, because no replica listens.

    `Guard` has run in the proxy: the headers are clean, and the body has been read.
    """
    headers = dict(request.headers.raw)
    request_id = headers[b"x-request-id"].decode()
    body = ReceivedBody(await request.body())
    try:
        response = await deployment.respond(
            Request(request.method, request.scope["path"], headers, body, request_id)
        )
    except Refused as refusal:
        response = Response.from_refusal(refusal)
    return starlette.responses.Response(
        response.body, response.status, dict(response.headers), response.media_type
    )
