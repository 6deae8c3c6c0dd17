"""The gRPC server of the gateway, and the Ray Serve deployment that it runs in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from app.config.serving import Issuer, Tls
from app.serving.gateway.bounds import (
    HEADERS_TIMEOUT_S,
    KEEP_ALIVE_TIMEOUT_S,
    MAX_BODY_BYTES,
    MAX_CONCURRENT_REQUESTS,
)
from app.serving.gateway.frontend import bracketed
from app.serving.gateway.grpc_admission import Admission
from app.serving.gateway.grpc_service import InferenceService

MAX_CALLS = 2 * MAX_CONCURRENT_REQUESTS
"""Maximum number of concurrent calls; further calls get RESOURCE_EXHAUSTED."""
STOP_TIMEOUT_S = 5.0
"""Time that calls get to finish when the server stops."""
OPTIONS = [
    ("grpc.max_send_message_length", MAX_BODY_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.server_handshake_timeout_ms", HEADERS_TIMEOUT_S * 1000),
    ("grpc.max_connection_idle_ms", KEEP_ALIVE_TIMEOUT_S * 1000),
    # Detects clients that disappeared without closing the connection.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
]
"""Channel arguments of the server."""


def create_server(service: Any, admission: Admission, max_message_bytes: int) -> Any:
    """A server with all its limits, not bound to a port yet."""
    server = grpc.aio.server(
        interceptors=[admission],
        options=[*OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)],
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    return server


class GrpcServer:
    """The Ray Serve deployment that runs the gRPC server."""

    def __init__(
        self,
        host: str,
        port: int,
        url: str,
        tls: Tls | None,
        issuers: Sequence[Issuer] = (),
        max_message_bytes: int = MAX_BODY_BYTES,
    ):
        """`issuers` are the issuers of all endpoints; empty if one of them requires no token.

        `url` is the URL of the HTTP server, and `max_message_bytes` the largest `limits.max_body_bytes` of
        the endpoints.
        """
        self._address = f"{bracketed(host)}:{port}"
        self._url = url
        self._tls = tls
        self._issuers = issuers
        self._max_message_bytes = max_message_bytes
        self._server: Any = None

    async def start(self) -> None:
        """Listen, unless the server listens already. Raises RuntimeError if the port is taken."""
        if self._server is not None:
            return
        self._service, self._admission = InferenceService(self._url), Admission(self._issuers)
        server = create_server(self._service, self._admission, self._max_message_bytes)
        if self._tls:
            pair = (Path(self._tls.key).read_bytes(), Path(self._tls.certificate).read_bytes())
            server.add_secure_port(self._address, grpc.ssl_server_credentials([pair]))
        else:
            server.add_insecure_port(self._address)
        await server.start()
        self._admission.start()
        self._server = server

    async def check_health(self) -> None:
        """Called by Serve, first when a replica starts: a restarted replica listens again."""
        await self.start()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        if self._server is not None:
            self._admission.stop()
            await self._server.stop(grace=STOP_TIMEOUT_S)
            await self._service.close()
