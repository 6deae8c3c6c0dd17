import asyncio
import contextlib

import pytest

from app.serving.gateway.body import ReceivedBody, StreamedBody, UnfinishedBodies
from app.serving.http import CLIENT_GONE, Refused


class Client:
    """Sends a body in chunks; at a chunk None it pauses until `resume` is set."""

    def __init__(self, *chunks):
        self._chunks = list(chunks)
        self.resume = asyncio.Event()
        self.num_receives = 0

    async def receive(self):
        self.num_receives += 1
        if not self._chunks:
            return {"type": "http.disconnect"}
        chunk = self._chunks.pop(0)
        if chunk is None:
            await self.resume.wait()
            return await self.receive()
        return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks)}


def body(client, unfinished=None, **headers):
    encoded = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return StreamedBody(encoded, client.receive, unfinished or UnfinishedBodies())


def refusal(awaitable):
    with pytest.raises(Refused) as refused:
        asyncio.run(awaitable)
    return refused.value


def test_a_body_is_read_completely():
    assert asyncio.run(body(Client(b"x" * 60, b"y" * 40)).read(100)) == b"x" * 60 + b"y" * 40
    assert asyncio.run(body(Client(b"")).read(100)) == b""
    assert asyncio.run(ReceivedBody(b"abc").read(3)) == b"abc"


@pytest.mark.parametrize("chunks", [(b"x" * 101,), (b"x" * 60, b"y" * 41, b"")])
def test_a_body_above_the_limit_is_refused(chunks):
    assert refusal(body(Client(*chunks)).read(100)).status == 413


def test_a_body_with_a_declared_length_above_the_limit_is_not_read():
    client = Client(b"x")
    assert refusal(body(client, content_length=b"101").read(100)).status == 413
    assert not client.num_receives


@pytest.mark.parametrize(
    "length", [b"", b"-1", b"1_0", b"1e3", b"0x10", b"9" * 20, b"9" * 5000, "٣".encode()]
)
def test_an_invalid_content_length_is_refused(length):
    with pytest.raises(Refused, match="content-length"):
        body(Client(b""), content_length=length)


def test_a_client_that_disconnects_gets_no_answer():
    assert refusal(body(Client()).read(100)).status == CLIENT_GONE


def test_the_time_limit_is_for_the_whole_body():
    """All chunks arrive quickly, but there are too many."""

    async def receive_byte():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert (
        refusal(StreamedBody({}, receive_byte, UnfinishedBodies(body_timeout_s=0.1)).read(10**6)).status
        == 408
    )


def test_the_oldest_unfinished_body_is_dropped_for_a_new_one():
    async def scene():
        unfinished = UnfinishedBodies(max_unfinished=2)
        paused = [Client(b"x", None, b"y") for _ in range(2)]
        reads = [asyncio.create_task(body(client, unfinished).read(100)) for client in paused]
        await asyncio.sleep(0)
        assert await body(Client(b"new"), unfinished).read(100) == b"new"
        with pytest.raises(Refused) as first:
            await reads[0]
        paused[1].resume.set()
        return first.value.status, await reads[1]

    assert asyncio.run(scene()) == (408, b"xy")


def test_unfinished_bodies_are_bounded_together():
    async def scene():
        unfinished = UnfinishedBodies(max_bytes=250)
        paused = [Client(b"x" * 100, None, b"y") for _ in range(12)]
        reads = [asyncio.create_task(body(client, unfinished).read(200)) for client in paused]
        for _ in range(3):
            await asyncio.sleep(0)
        num_bytes = unfinished._num_bytes()
        for client in paused:
            client.resume.set()
        results = await asyncio.gather(*reads, return_exceptions=True)
        return num_bytes, [type(result) for result in results], unfinished._unfinished

    num_bytes, results, left = asyncio.run(scene())
    assert num_bytes <= 250
    assert results == [Refused] * 10 + [bytes] * 2
    assert not left


@pytest.mark.parametrize(
    ("chunks", "read", "complete"),
    [
        ((b"",), False, True),
        ((b"all",), False, True),
        ((b"a", b"b"), False, False),
        ((None, b"late"), False, False),
        ((b"a", b"b"), True, True),
        ((b"x" * 60, b"y" * 60), True, False),
    ],
)
def test_a_body_is_complete_if_all_of_it_has_arrived(chunks, read, complete):
    async def scene():
        streamed = body(Client(*chunks))
        if read:
            with contextlib.suppress(Refused):
                await streamed.read(100)
        return await streamed.is_complete()

    assert asyncio.run(scene()) is complete
