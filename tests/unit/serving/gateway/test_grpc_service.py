"""The gRPC service in front of a stand-in for the HTTP server."""

import asyncio
import json

import aiohttp
import grpc
import numpy as np
import orjson
import pytest
from tritonclient.grpc import service_pb2 as messages

from app.serving.gateway.grpc_service import InferenceService
from app.serving.protocols.tensors import BINARY, HEADER_LENGTH

URL = "http://127.0.0.1:8000"


class HttpResponse:
    def __init__(self, status, document, headers, binary_data):
        self.status = status
        self._body = orjson.dumps(document) + binary_data
        self.headers = headers

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def read(self):
        return self._body


class HttpClient:
    """Records requests, and returns the same response to all of them."""

    def __init__(self, document, status=200, headers=None, binary_data=b"", error=None):
        self.requests = []
        self._response = HttpResponse(status, document, headers or {}, binary_data)
        self._error = error

    def request(self, method, url, headers, data):
        self.requests.append((method, url, headers, data and data.read()))
        if self._error is not None:
            raise self._error
        return self._response


class Aborted(Exception):
    pass


class Context:
    """The context of a call."""

    def __init__(self, metadata=()):
        self._metadata = metadata
        self.code = self.message = self.trailing = None

    def invocation_metadata(self):
        return self._metadata

    def set_trailing_metadata(self, metadata):
        self.trailing = metadata

    async def abort(self, code, message):
        self.code, self.message = code, message
        raise Aborted


def call(method, message, client, context=None):
    async def run():
        service = InferenceService(URL)
        await service.close()
        service._client = client
        return await getattr(service, method)(message, context or Context())

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "message", "path", "field"),
    [
        ("ServerLive", messages.ServerLiveRequest(), "/v2/health/live", "live"),
        ("ServerReady", messages.ServerReadyRequest(), "/v2/health/ready", "ready"),
        ("ModelReady", messages.ModelReadyRequest(name="a"), "/v2/models/a/ready", "ready"),
        (
            "ModelReady",
            messages.ModelReadyRequest(name="a/b", version="1"),
            "/v2/models/a%2Fb/versions/1/ready",
            "ready",
        ),
    ],
)
@pytest.mark.parametrize("status", [200, 503])
def test_health_is_the_status_of_the_http_server(method, message, path, field, status):
    client = HttpClient({}, status)
    assert getattr(call(method, message, client), field) == (status == 200)
    assert client.requests == [("GET", URL + path, {}, None)]


def test_metadata_of_the_server_and_of_a_model():
    server = {"name": "raylway", "version": "1", "extensions": ["binary_tensor_data"]}
    response = call("ServerMetadata", messages.ServerMetadataRequest(), HttpClient(server))
    assert (response.name, list(response.extensions)) == ("raylway", ["binary_tensor_data"])
    tensor = {"name": "age", "datatype": "FP64", "shape": [-1, 1]}
    model = {"name": "m", "versions": ["1"], "platform": "p", "inputs": [tensor], "outputs": []}
    response = call("ModelMetadata", messages.ModelMetadataRequest(name="m"), HttpClient(model))
    assert (response.inputs[0].name, list(response.inputs[0].shape)) == ("age", [-1, 1])


def test_a_call_becomes_an_http_request_with_binary_data():
    values = np.array([0.25], dtype="<f4")
    document = {
        "model_name": "m",
        "model_version": "1",
        "id": "r-1",
        "parameters": {"variant": "champion"},
        "outputs": [
            {
                "name": "probability",
                "datatype": "FP32",
                "shape": [1, 1],
                "parameters": {"binary_data_size": 4},
            }
        ],
    }
    headers = {HEADER_LENGTH: str(len(orjson.dumps(document)))}
    client = HttpClient(document, headers=headers, binary_data=values.tobytes())
    message = messages.ModelInferRequest(model_name="m", raw_input_contents=[b"12345678"])
    message.inputs.add(name="age", datatype="FP64", shape=[1, 1])
    metadata = (("authorization", "Bearer x"), ("x-other", "y"), ("traceparent", b"binary"))
    response = call("ModelInfer", message, client, Context(metadata))
    assert np.frombuffer(response.raw_output_contents[0], "<f4") == values
    ((method, url, headers, body),) = client.requests
    assert (method, url) == ("POST", f"{URL}/v2/models/m/infer")
    json_length = int(headers.pop(HEADER_LENGTH))
    assert headers == {"authorization": "Bearer x", "content-type": BINARY}
    assert json.loads(body[:json_length])["inputs"][0]["name"] == "age"
    assert body[json_length:] == b"12345678"


def test_a_refusal_ends_the_call_with_its_violations():
    refusal = {"error": "too many", "violations": [{"path": "rows.0.age", "message": "must be a number"}]}
    context = Context()
    with pytest.raises(Aborted):
        call(
            "ModelInfer",
            messages.ModelInferRequest(model_name="m"),
            HttpClient(refusal, 429, {"retry-after": "1"}),
            context,
        )
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.message == "too many; rows.0.age: must be a number"
    assert context.trailing == (("retry-after", "1"),)


def test_a_message_without_an_equivalent_in_http_is_refused():
    context = Context()
    message = messages.ModelInferRequest(model_name="m", raw_input_contents=[b""])
    with pytest.raises(Aborted):
        call("ModelInfer", message, HttpClient({}), context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


def test_an_http_server_that_does_not_answer_is_unavailable():
    context = Context()
    with pytest.raises(Aborted):
        call("ServerMetadata", None, HttpClient({}, error=aiohttp.ClientError("refused")), context)
    assert context.code is grpc.StatusCode.UNAVAILABLE
