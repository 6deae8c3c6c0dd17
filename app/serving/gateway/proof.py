"""Mutual authentication of HAProxy and the replicas of a cluster.

Other processes can reach the port of a replica: other users of the machine, the HAProxy of another cluster
whose replica had the port earlier, and in a cluster of several nodes every machine of its network. HAProxy
therefore adds a value that is derived from the cluster's secret to all requests and health checks
(`app.serving.gateway.haproxy`), and replicas add another derived value to all responses. HAProxy drops other
responses, because they may come from a process that took the port of a dead replica.

Both values are constant. They protect against accidental connections between unrelated processes, not against
an attacker: a process that deliberately takes the port of a dead replica receives requests, including
HAProxy's value, until the next health check.
"""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.gateway.haproxy import proofs
from app.serving.gateway.haproxy_config import (
    REQUEST_PROOF_HEADER,
    REQUEST_PROOF_VARIABLE,
    RESPONSE_PROOF_HEADER,
    RESPONSE_PROOF_VARIABLE,
)
from app.serving.http import Refused, Response, new_request_id
from app.serving.logs import log
from app.state.home import GATEWAY_SECRET_VARIABLE

HEADER = REQUEST_PROOF_HEADER.encode()


class ProofMiddleware:
    """Accepts only requests of the cluster's HAProxy, and adds the replica's proof to all responses."""

    def __init__(self, app: ASGIApp, secret: str):
        """`app.cluster.flags` sets the secret on all nodes. If it is empty, all requests are refused."""
        self._app = app
        values = proofs(secret)
        self._request_proof = values[REQUEST_PROOF_VARIABLE].encode() if secret else b""
        self._response_proof = (RESPONSE_PROOF_HEADER.encode(), values[RESPONSE_PROOF_VARIABLE].encode())
        if not secret:
            log.error(
                "%s must be set on all nodes; without it all requests are refused", GATEWAY_SECRET_VARIABLE
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        values = [value for name, value in scope["headers"] if name == HEADER]
        if self._request_proof and len(values) == 1 and hmac.compare_digest(values[0], self._request_proof):
            headers = [pair for pair in scope["headers"] if pair[0] != HEADER]
            await self._app({**scope, "headers": headers}, receive, self._with_proof(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            response = Response(Refused(403, "forbidden").body(), 403, {"connection": "close"})
            await response.send(send, new_request_id())

    def _with_proof(self, send: Send) -> Send:
        async def send_with_proof(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._response_proof]}
            await send(message)

        return send_with_proof
