"""Public keys of an issuer, fetched in the background: a token with a known key never waits for a fetch.

A task of the event loop fetches the keys every REFRESH_S, so a withdrawn key is accepted for at most
REFRESH_S and the time of one fetch. While fetches fail, the last keys stay valid for MAX_AGE_S; after that
all tokens are refused until a fetch succeeds. All times are measured with the monotonic clock.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from joserfc.jwk import KeySet

from app.serving.http import Refused
from app.serving.logs import log

REFRESH_S = 60.0
"""Interval between fetches."""
MIN_INTERVAL_S = 5.0
"""Minimum interval between fetches that follow a failure or a token with an unknown key."""
FETCH_TIMEOUT_S = 5.0
"""Time limit of a fetch."""
MAX_AGE_S = 3_600.0
"""Time for which fetched keys stay valid if they cannot be fetched again."""
MAX_KEY_SET_BYTES = 1_000_000
"""Maximum size of a key set."""


class Keys:
    """Public keys of one issuer. At most one fetch runs at a time; all callers share it."""

    def __init__(
        self,
        source: str,
        fetch_timeout_s: float = FETCH_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`source` is a URL or a file with a JSON Web Key Set."""
        self._source = source
        self._fetch_timeout_s = fetch_timeout_s
        self._clock = clock
        self._key_set = KeySet([])
        self._document: Any = None
        """The key set as it was fetched; None before the first fetch."""
        self._tls: ssl.SSLContext | None = None
        self._fetched_at = self._tried_at = float("-inf")
        self._fetch_task: asyncio.Task[None] | None = None
        """The fetch that runs now."""
        self._refresh_task: asyncio.Task[None] | None = None
        self.fault: str | None = None
        """Reason why the last fetch failed; None if it succeeded."""
        self.generation = 0
        """Number that increases whenever the keys change."""

    def start(self) -> None:
        """Fetch the keys now, and every REFRESH_S from now on. Must be called in an event loop."""
        self._refresh_task = asyncio.create_task(self._refresh())

    def stop(self) -> None:
        """Cancel all fetches."""
        for task in (self._refresh_task, self._fetch_task):
            if task is not None:
                task.cancel()

    def are_valid(self) -> bool:
        """Whether the keys are recent enough to check a token."""
        return self._clock() - self._fetched_at <= MAX_AGE_S

    async def current(self) -> KeySet:
        """The valid keys; waits for a fetch if there are none. Raises Refused with 503 if it fails."""
        if not self.are_valid():
            await self._fetch()
        if not self.are_valid():
            raise _unavailable()
        return self._key_set

    async def refetched(self) -> KeySet:
        """The keys after another fetch, for a token with an unknown key.

        No fetch starts within MIN_INTERVAL_S of the last. Raises Refused with 503 if the last fetch failed.
        """
        await self._fetch()
        if self.fault is not None:
            raise _unavailable()
        return self._key_set

    async def _refresh(self) -> None:
        while True:
            await self._fetch()
            await asyncio.sleep(MIN_INTERVAL_S if self.fault else REFRESH_S)

    async def _fetch(self) -> None:
        """Wait for the fetch that runs, or start one unless the last ended within MIN_INTERVAL_S."""
        if self._fetch_task is None:
            if self._clock() - self._tried_at <= MIN_INTERVAL_S:
                return
            self._fetch_task = asyncio.create_task(self._update())
        # A client that disconnects must not cancel the fetch that others wait for.
        await asyncio.shield(self._fetch_task)

    async def _update(self) -> None:
        try:
            async with asyncio.timeout(self._fetch_timeout_s):
                document = json.loads(await self._read())
                key_set = KeySet.import_key_set(document)
        except Exception as error:  # an issuer may send any content
            is_timeout = isinstance(error, TimeoutError)
            self._note_failure(
                f"no answer within {self._fetch_timeout_s:g} s" if is_timeout else f"{error!r:.300}"
            )
        else:
            if self.fault is not None:
                log.info("the keys at %s can be fetched again", self._source)
            if document != self._document:
                self.generation += 1
            self._key_set, self._document = key_set, document
            self._fetched_at, self.fault = self._clock(), None
        finally:
            self._tried_at, self._fetch_task = self._clock(), None

    def _note_failure(self, reason: str) -> None:
        fault = f"the keys at {self._source} cannot be fetched: {reason}"
        if self.fault is None:  # only the first failure in a row is logged
            consequence = (
                f"the last keys stay valid for {MAX_AGE_S:g} s" if self._document else "there are no keys yet"
            )
            log.warning("%s; %s", fault, consequence, exc_info=True)
        self.fault = fault

    async def _read(self) -> bytes:
        if not self._source.startswith(("http://", "https://")):
            return await asyncio.to_thread(Path(self._source).read_bytes)
        if self._tls is None:
            # Loading all CA certificates takes longer than the event loop may be blocked.
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        content = b""
        timeout_s = self._fetch_timeout_s
        async with (
            httpx.AsyncClient(verify=self._tls, timeout=timeout_s, follow_redirects=False) as client,
            client.stream("GET", self._source) as response,
        ):
            response.raise_for_status()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_KEY_SET_BYTES:
                    raise ValueError(f"the key set must not exceed {MAX_KEY_SET_BYTES:,} bytes")
        return content


def _unavailable() -> Refused:
    return Refused(503, "the issuer's keys cannot be fetched now; try again", headers={"retry-after": "5"})
