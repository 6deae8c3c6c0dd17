"""Replicas answer only the HAProxy of their own cluster, and prove to it that they are part of it.

A replica's port can be reached by others: other users of the machine, the HAProxy of another cluster whose
replica had the port before, and on a cluster of several nodes everybody in its network. HAProxy therefore
shows, with each request and health check, a value derived from the cluster's secret
(`app.serving.gateway.haproxy`), and each answer of a replica shows another. HAProxy passes no other answer
on, because a process that took a dead replica's port could give one.

Both values are constant. They keep apart processes that do not know of each other. A process that takes a
dead replica's port on purpose sees requests, and with them HAProxy's value, until the next health check.
"""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.gateway.haproxy import PROOF, PROOF_HEADER, SECRET_HEADER, SHOWN, proofs
from app.serving.http import Refused, Response, new_request_id
from app.serving.logs import log

HEADER = SECRET_HEADER.encode()


class ProofMiddleware:
    """Lets through what HAProxy shows, and nothing else; adds the proof to the answers."""

    def __init__(self, app: ASGIApp, secret: str):
        """Without a secret nothing gets through: `app.cluster.flags` sets it for all nodes of a cluster."""
        self._app = app
        values = proofs(secret)
        self._shown = values[SHOWN].encode() if secret else b""
        self._proof = (PROOF_HEADER.encode(), values[PROOF].encode())
        if not secret:
            log.error("RAYLWAY_FRONT_SECRET must be set on every node; without it no request is answered")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        shown = [value for name, value in scope["headers"] if name == HEADER]
        if self._shown and len(shown) == 1 and hmac.compare_digest(shown[0], self._shown):
            headers = [pair for pair in scope["headers"] if pair[0] != HEADER]
            await self._app({**scope, "headers": headers}, receive, self._proving(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            response = Response(Refused(403, "forbidden").body(), 403, {"connection": "close"})
            await response.send(send, new_request_id())

    def _proving(self, send: Send) -> Send:
        async def send_proved(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._proof]}
            await send(message)

        return send_proved
