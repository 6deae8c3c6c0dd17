"""The Open Inference Protocol v2 over gRPC, for the clients of KServe and Triton: each call becomes the HTTP
request that says the same, so that what is answered, refused and recorded is the same.

The call's metadata become headers: `authorization`, `x-raylway-unit` and so on. Tensors come as typed
contents or as raw ones, and go as raw ones.

https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import orjson
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from app.config.serving import Issuer, Tls
from app.serving.gateway.auth import Authenticator
from app.serving.gateway.body import BODY_S, UnfinishedBodies
from app.serving.gateway.frontend import bracketed
from app.serving.gateway.haproxy import ANSWER_S, HEAD_S, IDLE_S, IN_HAND, MAX_BODY_BYTES
from app.serving.http import Refused
from app.serving.protocols.grpc_tensors import InvalidMessage, from_http, to_http
from app.serving.protocols.tensors import HEADER_LENGTH

FORWARDED = (
    "authorization",
    "x-request-id",
    "x-raylway-unit",
    "x-raylway-variant",
    "traceparent",
    "tracestate",
)
CODES = {
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
SERVICE = "/inference.GRPCInferenceService/"
OPEN = {f"{SERVICE}{name}" for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata")}
"""Methods that need no token, as over HTTP."""
MAX_CALLS = 2 * IN_HAND
"""Calls at once; more get RESOURCE_EXHAUSTED."""
LIMITS = [
    ("grpc.max_send_message_length", MAX_BODY_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.server_handshake_timeout_ms", HEAD_S * 1000),
    ("grpc.max_connection_idle_ms", IDLE_S * 1000),
    # A client that is gone without a word is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
]


class Admission(grpc.aio.ServerInterceptor):
    """Reads a call's message only after its metadata have shown a good token, within the time and the number
    of unfinished ones that `app.serving.gateway.body` allows."""

    def __init__(self, issuers: Sequence[Issuer], room: Callable[[], UnfinishedBodies] = UnfinishedBodies):
        """Has no issuer: each endpoint checks the token itself."""
        self._authenticators = [Authenticator(issuer) for issuer in issuers]
        # Who shows no token must not take the places of those who do.
        self._open, self._closed = room(), room()

    def start(self) -> None:
        for authenticator in self._authenticators:
            authenticator.keys.start()

    def stop(self) -> None:
        for authenticator in self._authenticators:
            authenticator.keys.stop()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Called by gRPC for each call, when its metadata are there."""
        handler = await continuation(details)
        if handler is None:
            return None
        metadata = dict(details.invocation_metadata or ())

        async def answer(messages: Any, context: Any) -> Any:
            try:
                if details.method not in OPEN:
                    await self._require_token(str(metadata.get("authorization", "")))
                async with (self._open if details.method in OPEN else self._closed).place():
                    message = await anext(messages)
            except Refused as refused:
                await context.abort(CODES[refused.status], str(refused))
            except StopAsyncIteration:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call must have a message")
            return await handler.unary_unary(message, context)

        # A handler of one message would be called with it, when it has been received.
        return grpc.stream_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    async def _require_token(self, authorization: str) -> None:
        """Raise Refused unless an issuer has signed the token. Which model it is for is in the message."""
        refusal = None
        for authenticator in self._authenticators:
            try:
                if authenticator.known(authorization) is None:
                    await authenticator.principal(authorization)
                return
            except Refused as refused:
                refusal = refused
        if refusal is not None:
            raise refusal


class Gateway(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The service."""

    def __init__(self, url: str):
        """`url` is the HTTP server's."""
        self._url = url
        # It is this machine's own server, whose certificate names it as others know it.
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        timeout = aiohttp.ClientTimeout(total=ANSWER_S + BODY_S)
        self._client = aiohttp.ClientSession(connector=connector, trust_env=False, timeout=timeout)

    async def close(self) -> None:
        await self._client.close()

    async def ServerLive(self, request: Any, context: Any) -> Any:
        status, _, _ = await self._ask(context, "GET", "/v2/health/live")
        return messages.ServerLiveResponse(live=status == 200)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        status, _, _ = await self._ask(context, "GET", "/v2/health/ready")
        return messages.ServerReadyResponse(ready=status == 200)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        status, _, _ = await self._ask(context, "GET", f"{_path(request.name, request.version)}/ready")
        return messages.ModelReadyResponse(ready=status == 200)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        document = await self._get(context, "/v2")
        return messages.ServerMetadataResponse(
            name=document["name"], version=document["version"], extensions=document["extensions"]
        )

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        document = await self._get(context, _path(request.name, request.version))

        def tensor(item: dict[str, Any]) -> Any:
            kind = messages.ModelMetadataResponse.TensorMetadata
            return kind(name=item["name"], datatype=item["datatype"], shape=item["shape"])

        return messages.ModelMetadataResponse(
            name=document["name"],
            versions=document["versions"],
            platform=document["platform"],
            inputs=[tensor(item) for item in document["inputs"]],
            outputs=[tensor(item) for item in document["outputs"]],
        )

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        try:
            head, tail = to_http(request)
        except InvalidMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        body = orjson.dumps(head)
        headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(body))}
        path = f"{_path(request.model_name, request.model_version)}/infer"
        status, answered, content = await self._ask(context, "POST", path, headers, body + tail)
        if status != 200:
            await _abort(context, status, answered, content)
        return from_http(content, int(answered.get(HEADER_LENGTH, len(content))))

    async def _get(self, context: Any, path: str) -> dict[str, Any]:
        status, headers, content = await self._ask(context, "GET", path)
        if status != 200:
            await _abort(context, status, headers, content)
        return orjson.loads(content)

    async def _ask(
        self,
        context: Any,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> tuple[int, Any, bytes]:
        """The HTTP server's status, headers and body."""
        given = {
            k: v for k, v in context.invocation_metadata() or () if k in FORWARDED and isinstance(v, str)
        }
        try:
            async with self._client.request(
                method,
                self._url + path,
                headers={**given, **(headers or {})},
                data=None if body is None else io.BytesIO(body),  # bytes would be sent in one piece
            ) as response:
                return response.status, response.headers, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the endpoint does not answer: {error!r}")
            raise AssertionError from None


def server(gateway: Any, admission: Admission, max_message_bytes: int) -> Any:
    """A server with all its limits, on no port yet."""
    made = grpc.aio.server(
        interceptors=[admission],
        options=[*LIMITS, ("grpc.max_receive_message_length", max_message_bytes)],
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(gateway, made)
    return made


class Grpc:
    """The deployment, in which the server runs."""

    def __init__(
        self,
        host: str,
        port: int,
        url: str,
        tls: Tls | None,
        issuers: Sequence[Issuer] = (),
        max_message_bytes: int = MAX_BODY_BYTES,
    ):
        """`issuers` are those of all endpoints, none if one of them asks for no token; `max_message_bytes` is
        the largest `limits.max_body_bytes` among them."""
        self._address = f"{bracketed(host)}:{port}"
        self._url = url
        self._tls = tls
        self._issuers = issuers
        self._max_message_bytes = max_message_bytes
        self._server: Any = None

    async def start(self) -> None:
        """Listen. Raises RuntimeError if the port is taken."""
        if self._server is not None:
            return
        self._gateway, self._admission = Gateway(self._url), Admission(self._issuers)
        made = server(self._gateway, self._admission, self._max_message_bytes)
        if self._tls:
            pem = (Path(self._tls.key).read_bytes(), Path(self._tls.certificate).read_bytes())
            made.add_secure_port(self._address, grpc.ssl_server_credentials([pem]))
        else:
            made.add_insecure_port(self._address)
        await made.start()
        self._admission.start()
        self._server = made

    async def check_health(self) -> None:
        """Called by Serve, at first before anything else: a replica that was started anew listens again."""
        await self.start()

    async def __del__(self) -> None:
        if self._server is not None:
            self._admission.stop()
            await self._server.stop(grace=5)
            await self._gateway.close()


def _path(name: str, version: str) -> str:
    # A name with a slash would be another path; no model has one.
    name, version = name.replace("/", "%2F"), version.replace("/", "%2F")
    return f"/v2/models/{name}/versions/{version}" if version else f"/v2/models/{name}"


async def _abort(context: Any, status: int, headers: Any, content: bytes) -> None:
    """End the call with what HTTP was answered."""
    document = orjson.loads(content)
    message = document.get("error") or "not ready"
    told = [f"{v['path']}: {v['message']}" for v in document.get("violations", [])]
    if "retry-after" in headers:
        context.set_trailing_metadata((("retry-after", headers["retry-after"]),))
    await context.abort(CODES.get(status, grpc.StatusCode.INTERNAL), "; ".join([message, *told])[:4000])
