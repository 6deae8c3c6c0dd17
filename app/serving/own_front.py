"""Replicas answer only the HAProxy of their own cluster.

They listen on a port that others can connect to: other users of the machine, HAProxy of another cluster whose
replica had the port before, and on a cluster of several nodes whoever is in its network. HAProxy shows the
cluster's secret with each request (app.serving.front), health checks included.
"""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from app.serving.front import SECRET_HEADER
from app.serving.http import Response, new_request_id
from app.serving.logs import log
from app.serving.protocol import Refused

HEADER = SECRET_HEADER.encode()


class OwnFront:
    """Lets through what shows the secret, and nothing else."""

    def __init__(self, app: ASGIApp, secret: str):
        """Without a secret nothing gets through: `app.flags` sets it for all nodes of a cluster."""
        self._app = app
        self._secret = secret.encode()
        if not secret:
            log.error("RAYLWAY_FRONT_SECRET must be set on every node; without it no request is answered")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        shown = [value for name, value in scope["headers"] if name == HEADER]
        if self._secret and len(shown) == 1 and hmac.compare_digest(shown[0], self._secret):
            headers = [pair for pair in scope["headers"] if pair[0] != HEADER]
            await self._app({**scope, "headers": headers}, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            response = Response(Refused(403, "forbidden").body(), 403, {"connection": "close"})
            await response.send(send, new_request_id())
