"""What a call is asked for before its message is read: a real server and a real client."""

import asyncio
import contextlib

import grpc
import pytest
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from app.config.serving import Issuer
from app.serving.gateway import issuer
from app.serving.gateway.body import UnfinishedBodies
from app.serving.gateway.grpc import SERVICE, Admission, server

LIMIT = 100_000


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self):
        self.seen = []

    async def ModelInfer(self, request, context):
        self.seen.append(request.model_name)
        return messages.ModelInferResponse(model_name=request.model_name)

    async def ServerLive(self, request, context):
        return messages.ServerLiveResponse(live=True)


def scene(play, secured=True, room=UnfinishedBodies):
    """Plays it with a channel, the calls that were answered, and a good token's metadata."""
    issuers = [Issuer(issuer=issuer.ISSUER, audience=issuer.AUDIENCE, jwks=str(issuer.jwks()))]
    token = (("authorization", f"Bearer {issuer.issue('bob', ['predict'], 1)}"),)

    async def run():
        servicer, admission = Servicer(), Admission(issuers if secured else [], room)
        servicer.admission = admission
        made = server(servicer, admission, LIMIT)
        port = made.add_insecure_port("127.0.0.1:0")
        await made.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await play(channel, servicer, token)
        finally:
            await made.stop(None)

    return asyncio.run(run())


def infer(channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer


async def silence():
    """A message that never comes."""
    await asyncio.Event().wait()
    yield


def silent(channel, metadata=(), method="ModelInfer"):
    """A call whose message never comes; over the network it is as any call."""
    make = channel.stream_unary(
        SERVICE + method,
        request_serializer=messages.ModelInferRequest.SerializeToString,
        response_deserializer=messages.ModelInferResponse.FromString,
    )
    return make(silence(), metadata=metadata)


async def code(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_good_token_opens():
    async def play(channel, servicer, token):
        answered = await infer(channel)(messages.ModelInferRequest(model_name="income"), metadata=token)
        assert answered.model_name == "income"

    scene(play)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer x.y.z"),)])
def test_without_a_good_token_the_message_is_not_waited_for(metadata):
    async def play(channel, servicer, token):
        assert await code(silent(channel, metadata)) is grpc.StatusCode.UNAUTHENTICATED
        assert not servicer.seen

    scene(play)


def test_where_an_endpoint_is_open_tokens_are_left_to_the_endpoints():
    async def play(channel, servicer, token):
        assert await code(infer(channel)(messages.ModelInferRequest(model_name="m"))) is grpc.StatusCode.OK

    scene(play, secured=False)


def test_health_needs_no_token():
    async def play(channel, servicer, token):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ServerLive(messages.ServerLiveRequest())).live

    scene(play)


def test_a_message_that_does_not_come_is_not_waited_for_without_end():
    async def play(channel, servicer, token):
        assert await code(silent(channel, token)) is grpc.StatusCode.DEADLINE_EXCEEDED

    scene(play, room=lambda: UnfinishedBodies(body_s=0.1))


def test_messages_that_never_come_leave_places_for_others():
    """Neither do those of calls that need no token take the places of others."""

    async def play(channel, servicer, token):
        waiting = [asyncio.ensure_future(code(silent(channel, token))) for _ in range(2)]
        waiting += [asyncio.ensure_future(code(silent(channel, (), "ServerLive"))) for _ in range(5)]
        rooms = servicer.admission._open, servicer.admission._closed
        while not all(len(room._unfinished) == 2 for room in rooms):
            await asyncio.sleep(0.001)
        for _ in range(3):
            asked = infer(channel)(messages.ModelInferRequest(model_name="m"), metadata=token)
            assert await code(asked) is grpc.StatusCode.OK
        for each in waiting:
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*waiting)

    scene(play, room=lambda: UnfinishedBodies(max_unfinished=2))


def test_a_message_beyond_the_models_limit_is_refused():
    async def play(channel, servicer, token):
        large = messages.ModelInferRequest(model_name="m", raw_input_contents=[b"x" * LIMIT])
        assert await code(infer(channel)(large, metadata=token)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not servicer.seen

    scene(play)


def test_a_call_without_a_message_is_told_so():
    async def play(channel, servicer, token):
        async def nothing():
            return
            yield

        make = channel.stream_unary(SERVICE + "ModelInfer")
        assert await code(make(nothing(), metadata=token)) is grpc.StatusCode.INVALID_ARGUMENT

    scene(play)
