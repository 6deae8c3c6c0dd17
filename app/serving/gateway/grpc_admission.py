"""Admission of gRPC calls: checks the token before the message is read, and bounds unfinished messages."""

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from app.config.serving import Issuer
from app.serving.gateway.auth import Authenticator
from app.serving.gateway.body import UnfinishedBodies
from app.serving.http import Refused

STATUS_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""gRPC status codes by HTTP status."""
SERVICE = "/inference.GRPCInferenceService/"
"""Path of the service, the prefix of its methods."""
OPEN_METHODS = {f"{SERVICE}{name}" for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata")}
"""Methods that require no token, as over HTTP."""


class Admission(grpc.aio.ServerInterceptor):
    """Reads the message of a call only after it has found a valid token in the metadata.

    Messages have the time limit and the bounds of `app.serving.gateway.body`.
    """

    def __init__(
        self, issuers: Sequence[Issuer], unfinished: Callable[[], UnfinishedBodies] = UnfinishedBodies
    ):
        """Tokens of all `issuers` are accepted. If there are none, only the endpoints check tokens."""
        self._authenticators = [Authenticator(issuer) for issuer in issuers]
        # Calls without a token must not take places from calls with one.
        self._open, self._authenticated = unfinished(), unfinished()

    def start(self) -> None:
        """Start fetching the issuers' keys. Must be called in an event loop."""
        for authenticator in self._authenticators:
            authenticator.keys.start()

    def stop(self) -> None:
        """Stop fetching the issuers' keys."""
        for authenticator in self._authenticators:
            authenticator.keys.stop()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call. gRPC calls this when the metadata have arrived."""
        handler = await continuation(details)
        if handler is None:
            return None
        metadata = dict(details.invocation_metadata or ())
        is_open = details.method in OPEN_METHODS

        async def respond(messages: Any, context: Any) -> Any:
            try:
                if not is_open:
                    await self._require_token(str(metadata.get("authorization", "")))
                async with (self._open if is_open else self._authenticated).place():
                    message = await anext(messages)
            except Refused as refusal:
                await context.abort(STATUS_CODES[refusal.status], str(refusal))
            except StopAsyncIteration:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call must have a message")
            return await handler.unary_unary(message, context)

        # gRPC calls a unary handler after it has received the message, and a stream handler before.
        return grpc.stream_unary_rpc_method_handler(
            respond, handler.request_deserializer, handler.response_serializer
        )

    async def _require_token(self, authorization: str) -> None:
        """Raise Refused unless one of the issuers signed the token.

        The endpoint checks the scope: the message, still unread, names the model.
        """
        last_refusal = None
        for authenticator in self._authenticators:
            try:
                if authenticator.cached(authorization) is None:
                    await authenticator.principal(authorization)
                return
            except Refused as refusal:
                last_refusal = refusal
        if last_refusal is not None:
            raise last_refusal
