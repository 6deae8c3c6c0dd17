"""The gRPC service of the Open Inference Protocol v2, for clients of KServe and Triton.

A call is converted to the equivalent HTTP request, so that answers, refusals and records are the same as over
HTTP. The metadata FORWARDED_METADATA become HTTP headers.

https://github.com/open-inference/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

import io
from typing import Any, NamedTuple

import aiohttp
import grpc
import orjson
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from app.serving.gateway.body import BODY_TIMEOUT_S
from app.serving.gateway.bounds import RESPONSE_TIMEOUT_S
from app.serving.gateway.grpc_admission import STATUS_CODES
from app.serving.protocols.grpc_tensors import InvalidMessage, from_http, to_http
from app.serving.protocols.tensors import BINARY, HEADER_LENGTH

FORWARDED_METADATA = (
    "authorization",
    "x-request-id",
    "x-raylway-unit",
    "x-raylway-variant",
    "traceparent",
    "tracestate",
)
"""Metadata of a call that are sent as headers of the HTTP request."""
MAX_ERROR_LENGTH = 4000
"""Maximum length of an error message in characters; gRPC sends it in a header."""


class _HttpResponse(NamedTuple):
    status: int
    headers: Any
    body: bytes


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers the calls of the protocol with the answers of the HTTP server."""

    def __init__(self, url: str):
        """`url` is the URL of the HTTP server. Must be called in an event loop."""
        self._url = url
        # The certificate is not verified: the server is on this machine, under another name.
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        timeout = aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S + BODY_TIMEOUT_S)
        self._client = aiohttp.ClientSession(connector=connector, trust_env=False, timeout=timeout)

    async def close(self) -> None:
        """Close all connections to the HTTP server."""
        await self._client.close()

    async def ServerLive(self, request: Any, context: Any) -> Any:
        response = await self._send(context, "GET", "/v2/health/live")
        return messages.ServerLiveResponse(live=response.status == 200)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        response = await self._send(context, "GET", "/v2/health/ready")
        return messages.ServerReadyResponse(ready=response.status == 200)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        response = await self._send(context, "GET", f"{_model_path(request.name, request.version)}/ready")
        return messages.ModelReadyResponse(ready=response.status == 200)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        document = await self._get(context, "/v2")
        return messages.ServerMetadataResponse(
            name=document["name"], version=document["version"], extensions=document["extensions"]
        )

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        document = await self._get(context, _model_path(request.name, request.version))
        return messages.ModelMetadataResponse(
            name=document["name"],
            versions=document["versions"],
            platform=document["platform"],
            inputs=[_tensor_metadata(tensor) for tensor in document["inputs"]],
            outputs=[_tensor_metadata(tensor) for tensor in document["outputs"]],
        )

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        try:
            document, binary_data = to_http(request)
        except InvalidMessage as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        content = orjson.dumps(document)
        headers = {"content-type": BINARY, HEADER_LENGTH: str(len(content))}
        path = f"{_model_path(request.model_name, request.model_version)}/infer"
        response = await self._send(context, "POST", path, headers, content + binary_data)
        if response.status != 200:
            await _abort(context, response)
        json_length = int(response.headers.get(HEADER_LENGTH, len(response.body)))
        return from_http(response.body, json_length)

    async def _get(self, context: Any, path: str) -> dict[str, Any]:
        """The JSON document of a path. Ends the call if the server refuses."""
        response = await self._send(context, "GET", path)
        if response.status != 200:
            await _abort(context, response)
        return orjson.loads(response.body)

    async def _send(
        self,
        context: Any,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> _HttpResponse:
        """Send a request to the HTTP server. Ends the call if the server does not answer."""
        forwarded = {
            name: value
            for name, value in context.invocation_metadata() or ()
            if name in FORWARDED_METADATA and isinstance(value, str)
        }
        try:
            async with self._client.request(
                method,
                self._url + path,
                headers={**forwarded, **(headers or {})},
                # aiohttp would write raw bytes in one piece, which blocks the event loop.
                data=None if body is None else io.BytesIO(body),
            ) as response:
                return _HttpResponse(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the endpoint does not answer: {error!r}")
            raise AssertionError from None


def _tensor_metadata(tensor: dict[str, Any]) -> Any:
    return messages.ModelMetadataResponse.TensorMetadata(
        name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"]
    )


def _model_path(name: str, version: str) -> str:
    """Path of a model or of one of its versions. A slash in a name must not change the path."""
    name, version = name.replace("/", "%2F"), version.replace("/", "%2F")
    return f"/v2/models/{name}/versions/{version}" if version else f"/v2/models/{name}"


async def _abort(context: Any, response: _HttpResponse) -> None:
    """End the call with the refusal that the HTTP server sent."""
    document = orjson.loads(response.body)
    error = document.get("error") or "not ready"
    violations = [f"{v['path']}: {v['message']}" for v in document.get("violations", [])]
    if "retry-after" in response.headers:
        context.set_trailing_metadata((("retry-after", response.headers["retry-after"]),))
    code = STATUS_CODES.get(response.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, "; ".join([error, *violations])[:MAX_ERROR_LENGTH])
