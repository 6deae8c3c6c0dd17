import asyncio
import contextlib

import pytest

from app.serving.gateway.body import ReceivedBody, StreamedBody, UnfinishedBodies
from app.serving.http import CLIENT_GONE, Refused


class Client:
    """Sends a body in chunks; where a chunk is None it is silent until `go_on` is set."""

    def __init__(self, *chunks):
        self._chunks = list(chunks)
        self.go_on = asyncio.Event()
        self.asked = 0

    async def receive(self):
        self.asked += 1
        if not self._chunks:
            return {"type": "http.disconnect"}
        chunk = self._chunks.pop(0)
        if chunk is None:
            await self.go_on.wait()
            return await self.receive()
        return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks)}


def body(client, room=None, **headers):
    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return StreamedBody(named, client.receive, room or UnfinishedBodies())


def refused(awaitable):
    with pytest.raises(Refused) as error:
        asyncio.run(awaitable)
    return error.value


def test_a_body_comes_whole():
    assert asyncio.run(body(Client(b"x" * 60, b"y" * 40)).read(100)) == b"x" * 60 + b"y" * 40
    assert asyncio.run(body(Client(b"")).read(100)) == b""
    assert asyncio.run(ReceivedBody(b"abc").read(3)) == b"abc"


@pytest.mark.parametrize("chunks", [(b"x" * 101,), (b"x" * 60, b"y" * 41, b"")])
def test_a_larger_body_is_refused(chunks):
    assert refused(body(Client(*chunks)).read(100)).status == 413


def test_a_body_that_is_declared_larger_is_not_read():
    client = Client(b"x")
    assert refused(body(client, content_length=b"101").read(100)).status == 413
    assert not client.asked


@pytest.mark.parametrize(
    "length", [b"", b"-1", b"1_0", b"1e3", b"0x10", b"9" * 20, b"9" * 5000, "٣".encode()]
)
def test_a_length_that_is_no_number_of_bytes_is_refused(length):
    with pytest.raises(Refused, match="content-length"):
        body(Client(b""), content_length=length)


def test_a_client_that_leaves_is_told_nothing():
    assert refused(body(Client()).read(100)).status == CLIENT_GONE


def test_a_body_that_drips_has_one_time_limit():
    """Each chunk is on time; the whole is not."""

    async def drip():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert refused(StreamedBody({}, drip, UnfinishedBodies(body_s=0.1)).read(10**6)).status == 408


def test_the_oldest_unfinished_body_makes_room_for_a_new_one():
    async def scene():
        room = UnfinishedBodies(max_unfinished=2)
        silent = [Client(b"x", None, b"y") for _ in range(2)]
        reads = [asyncio.create_task(body(client, room).read(100)) for client in silent]
        await asyncio.sleep(0)
        assert await body(Client(b"new"), room).read(100) == b"new"
        with pytest.raises(Refused) as first:
            await reads[0]
        silent[1].go_on.set()
        return first.value.status, await reads[1]

    assert asyncio.run(scene()) == (408, b"xy")


def test_unfinished_bodies_are_bounded_together():
    async def scene():
        room = UnfinishedBodies(max_bytes=250)
        silent = [Client(b"x" * 100, None, b"y") for _ in range(12)]
        reads = [asyncio.create_task(body(client, room).read(200)) for client in silent]
        for _ in range(3):
            await asyncio.sleep(0)
        held = room._num_bytes()
        for client in silent:
            client.go_on.set()
        ended = await asyncio.gather(*reads, return_exceptions=True)
        return held, [type(each) for each in ended], room._unfinished

    held, ended, left = asyncio.run(scene())
    assert held <= 250
    assert ended == [Refused] * 10 + [bytes] * 2
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
def test_whether_something_is_left_to_come(chunks, read, complete):
    async def scene():
        asked = body(Client(*chunks))
        if read:
            with contextlib.suppress(Refused):
                await asked.read(100)
        return await asked.complete()

    assert asyncio.run(scene()) is complete
