"""The body of a request, read only when the endpoint asks for it: after the token and the limits that the
headers alone decide.

A body has a limit in bytes and one time limit for all of it. The unfinished bodies of a process are bounded
together, in number and in bytes. Whoever has been sending for longest makes room for a new one, so that slow
clients cannot keep out fast ones.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive

from app.serving.gateway.haproxy import IN_HAND, MAX_BODY_BYTES
from app.serving.http import CLIENT_GONE, Refused

BODY_S = 10.0
"""Time for a whole body to arrive, however many chunks it comes in."""
MAX_UNFINISHED = IN_HAND // 2
"""Unfinished bodies per process. The other half of a replica's places stays with complete requests."""


class UnfinishedBodies:
    """The unfinished bodies of a process."""

    def __init__(
        self,
        max_bytes: int = MAX_BODY_BYTES,
        max_unfinished: int = MAX_UNFINISHED,
        body_s: float = BODY_S,
    ):
        self._max_bytes = max_bytes
        self._max_unfinished = max_unfinished
        self._body_s = body_s
        self._unfinished: dict[asyncio.Timeout, int] = {}
        """Bytes so far by the body's time limit, the oldest first."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[asyncio.Timeout]:
        """A place for a body, until the block ends. Raises Refused if it takes too long."""
        try:
            async with asyncio.timeout(self._body_s) as limit:
                self._unfinished[limit] = 0
                self._make_room()
                try:
                    yield limit
                finally:
                    self._unfinished.pop(limit, None)
        except TimeoutError:
            error = (
                f"the body must arrive within {self._body_s:g} s, sooner while many others do; send it again"
            )
            raise Refused(408, error) from None

    async def read(self, receive: Receive, max_bytes: int) -> bytes:
        """A whole body. Raises Refused if it is too large or too slow, or if the client leaves."""
        body = bytearray()
        async with self.place() as limit:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(CLIENT_GONE, "the client closed the connection before the end of the body")
                part = message.get("body", b"")
                if len(body) + len(part) > max_bytes:
                    raise too_large(max_bytes)
                if not message.get("more_body", False):
                    return bytes(body) + part if body else part
                body += part
                if limit in self._unfinished:
                    self._unfinished[limit] = len(body)
                    self._make_room()
        raise AssertionError

    def _make_room(self) -> None:
        """End the oldest bodies until the others are within the bounds."""
        while len(self._unfinished) > self._max_unfinished or self._num_bytes() > self._max_bytes:
            oldest = next(iter(self._unfinished))
            del self._unfinished[oldest]
            oldest.reschedule(asyncio.get_running_loop().time())

    def _num_bytes(self) -> int:
        return sum(self._unfinished.values())


class StreamedBody:
    """A request's body, not read yet."""

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, room: UnfinishedBodies):
        self._declared = _declared(headers)
        self._receive = receive
        self._room = room
        self._begun = self._complete = False

    async def read(self, max_bytes: int) -> bytes:
        """All of it; may be called once. Raises Refused, without reading what is declared to be too large."""
        if self._declared > max_bytes:
            raise too_large(max_bytes)
        self._begun = True
        body = await self._room.read(self._receive, max_bytes)
        self._complete = True
        return body

    async def complete(self) -> bool:
        """Whether nothing of it is left to come, for an answer that is given without it. Never waits."""
        if self._begun:
            return self._complete
        try:
            async with asyncio.timeout(0):
                message = await self._receive()
        except TimeoutError:
            return False
        return not message.get("more_body", False)


class ReceivedBody(StreamedBody):
    """A body that has been read by somebody else."""

    def __init__(self, content: bytes):
        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": content}

        super().__init__({}, receive, UnfinishedBodies())


def too_large(max_bytes: int) -> Refused:
    return Refused(413, f"the body must not exceed {max_bytes} bytes")


def _declared(headers: Mapping[bytes, bytes]) -> int:
    """Bytes by the content-length, 0 without one. Raises Refused if it is no number of bytes."""
    text = headers.get(b"content-length", b"0")
    if not text.isdigit() or len(text) > 19:  # as many digits as a 64-bit integer may have
        raise Refused(400, "the header content-length must be a number of bytes")
    return int(text)
