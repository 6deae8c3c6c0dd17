"""Request bodies. An endpoint reads a body after all checks that need only the headers.

A body has a maximum size and a time limit. The unfinished bodies of a process are bounded together, in
number and in bytes; beyond that the oldest one is refused, so that slow clients cannot block fast ones.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive

from app.serving.gateway.bounds import MAX_BODY_BYTES, MAX_CONCURRENT_REQUESTS
from app.serving.http import CLIENT_GONE, Refused

BODY_TIMEOUT_S = 10.0
"""Time limit for a whole body to arrive, in any number of chunks."""
MAX_UNFINISHED = MAX_CONCURRENT_REQUESTS // 2
"""Maximum number of unfinished bodies per process. The other half of a replica's places stays free for
requests whose bodies have arrived."""


class UnfinishedBodies:
    """The unfinished bodies of a process."""

    def __init__(
        self,
        max_bytes: int = MAX_BODY_BYTES,
        max_unfinished: int = MAX_UNFINISHED,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ):
        self._max_bytes = max_bytes
        self._max_unfinished = max_unfinished
        self._body_timeout_s = body_timeout_s
        self._unfinished: dict[asyncio.Timeout, int] = {}
        """Bytes received so far, by the time limit of the body; the oldest body comes first."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[asyncio.Timeout]:
        """Reserve a place for a body during the block; yields the body's time limit.

        Raises Refused with 408 if the block takes longer than the time limit.
        """
        try:
            async with asyncio.timeout(self._body_timeout_s) as limit:
                self._unfinished[limit] = 0
                self._make_room()
                try:
                    yield limit
                finally:
                    self._unfinished.pop(limit, None)
        except TimeoutError:
            raise Refused(
                408,
                f"the body must arrive within {self._body_timeout_s:g} s, less under load; send it again",
            ) from None

    async def read(self, receive: Receive, max_bytes: int) -> bytes:
        """Read a whole body.

        Raises Refused with 413 if it is too large, 408 if it is too slow, and CLIENT_GONE if the client
        disconnects.
        """
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
        """Expire the oldest bodies until the others are within the limits."""
        while len(self._unfinished) > self._max_unfinished or self._num_bytes() > self._max_bytes:
            oldest = next(iter(self._unfinished))
            del self._unfinished[oldest]
            oldest.reschedule(asyncio.get_running_loop().time())

    def _num_bytes(self) -> int:
        return sum(self._unfinished.values())


class StreamedBody:
    """The body of a request, still unread."""

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, unfinished: UnfinishedBodies):
        self._declared_bytes = _declared_bytes(headers)
        self._receive = receive
        self._unfinished = unfinished
        self._has_started = self._is_complete = False

    async def read(self, max_bytes: int) -> bytes:
        """Read the whole body; may be called once.

        Raises Refused as `UnfinishedBodies.read` does. If the declared length is too large, nothing is read.
        """
        if self._declared_bytes > max_bytes:
            raise too_large(max_bytes)
        self._has_started = True
        body = await self._unfinished.read(self._receive, max_bytes)
        self._is_complete = True
        return body

    async def is_complete(self) -> bool:
        """Whether the body has arrived completely, read or not. Does not wait for the client."""
        if self._has_started:
            return self._is_complete
        try:
            async with asyncio.timeout(0):
                message = await self._receive()
        except TimeoutError:
            return False
        return not message.get("more_body", False)


class ReceivedBody(StreamedBody):
    """A body that has already been received."""

    def __init__(self, content: bytes):
        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": content}

        super().__init__({}, receive, UnfinishedBodies())


def too_large(max_bytes: int) -> Refused:
    """A refusal with 413."""
    return Refused(413, f"the body must not exceed {max_bytes} bytes")


def _declared_bytes(headers: Mapping[bytes, bytes]) -> int:
    """The header content-length, 0 if it is missing. Raises Refused with 400 if it is not a number."""
    text = headers.get(b"content-length", b"0")
    if not text.isdigit() or len(text) > 19:  # digits of a 64-bit integer
        raise Refused(400, "the header content-length must be a number of bytes")
    return int(text)
