"""Admission of calls, with a real gRPC server and a real client."""

import asyncio
import contextlib

import grpc
import pytest
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from app.config.serving import Issuer
from app.serving.gateway import issuer
from app.serving.gateway.body import UnfinishedBodies
from app.serving.gateway.grpc import create_server
from app.serving.gateway.grpc_admission import SERVICE, Admission

MAX_MESSAGE_BYTES = 100_000


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers without a model, and records the names of the models."""

    def __init__(self):
        self.models = []

    async def ModelInfer(self, request, context):
        self.models.append(request.model_name)
        return messages.ModelInferResponse(model_name=request.model_name)

    async def ServerLive(self, request, context):
        return messages.ServerLiveResponse(live=True)


def scene(play, secured=True, unfinished=UnfinishedBodies):
    """Run the coroutine function `play` with a channel, the service, and metadata with a valid token."""
    issuers = [Issuer(issuer=issuer.ISSUER, audience=issuer.AUDIENCE, jwks=str(issuer.jwks()))]
    token = (("authorization", f"Bearer {issuer.issue('bob', ['predict'], 1)}"),)

    async def run():
        service, admission = Service(), Admission(issuers if secured else [], unfinished)
        service.admission = admission
        server = create_server(service, admission, MAX_MESSAGE_BYTES)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await play(channel, service, token)
        finally:
            await server.stop(None)

    return asyncio.run(run())


def infer(channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer


async def silence():
    """Messages that never arrive."""
    await asyncio.Event().wait()
    yield


def silent(channel, metadata=(), method="ModelInfer"):
    """A call whose message never arrives."""
    call = channel.stream_unary(
        SERVICE + method,
        request_serializer=messages.ModelInferRequest.SerializeToString,
        response_deserializer=messages.ModelInferResponse.FromString,
    )
    return call(silence(), metadata=metadata)


async def code(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_call_with_a_valid_token_is_answered():
    async def play(channel, service, token):
        response = await infer(channel)(messages.ModelInferRequest(model_name="income"), metadata=token)
        assert response.model_name == "income"

    scene(play)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer x.y.z"),)])
def test_without_a_valid_token_the_message_is_not_read(metadata):
    async def play(channel, service, token):
        assert await code(silent(channel, metadata)) is grpc.StatusCode.UNAUTHENTICATED
        assert not service.models

    scene(play)


def test_without_issuers_calls_without_a_token_are_answered():
    async def play(channel, service, token):
        assert await code(infer(channel)(messages.ModelInferRequest(model_name="m"))) is grpc.StatusCode.OK

    scene(play, secured=False)


def test_health_needs_no_token():
    async def play(channel, service, token):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ServerLive(messages.ServerLiveRequest())).live

    scene(play)


def test_a_message_that_does_not_arrive_ends_the_call():
    async def play(channel, service, token):
        assert await code(silent(channel, token)) is grpc.StatusCode.DEADLINE_EXCEEDED

    scene(play, unfinished=lambda: UnfinishedBodies(body_timeout_s=0.1))


def test_unfinished_calls_leave_places_for_others():
    """This holds for calls with a token, and for those to open methods."""

    async def play(channel, service, token):
        waiting = [asyncio.ensure_future(code(silent(channel, token))) for _ in range(2)]
        waiting += [asyncio.ensure_future(code(silent(channel, (), "ServerLive"))) for _ in range(5)]
        bodies = service.admission._open, service.admission._authenticated
        while not all(len(unfinished._unfinished) == 2 for unfinished in bodies):
            await asyncio.sleep(0.001)
        for _ in range(3):
            call = infer(channel)(messages.ModelInferRequest(model_name="m"), metadata=token)
            assert await code(call) is grpc.StatusCode.OK
        for call in waiting:
            call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*waiting)

    scene(play, unfinished=lambda: UnfinishedBodies(max_unfinished=2))


def test_a_message_above_the_limit_is_refused():
    async def play(channel, service, token):
        large = messages.ModelInferRequest(model_name="m", raw_input_contents=[b"x" * MAX_MESSAGE_BYTES])
        assert await code(infer(channel)(large, metadata=token)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not service.models

    scene(play)


def test_a_call_without_a_message_is_refused():
    async def play(channel, service, token):
        async def nothing():
            return
            yield

        call = channel.stream_unary(SERVICE + "ModelInfer")
        assert await code(call(nothing(), metadata=token)) is grpc.StatusCode.INVALID_ARGUMENT

    scene(play)
