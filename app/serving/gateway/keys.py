"""The public keys of an issuer, fetched behind the answers: a token whose key is known never waits for them.

A task of the replica's event loop fetches them anew every REFRESH_S, so a key that the issuer withdrew is
dropped after REFRESH_S and the time of one fetch. While the issuer is away the last keys hold, for KEEP_S;
then no token is accepted until it is back. All of it goes by the monotonic clock.
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
"""Time between two fetches."""
AGAIN_S = 5.0
"""Minimum time between fetches that fail, or that tokens with an unknown key ask for."""
FETCH_S = 5.0
"""Time limit for a whole fetch."""
KEEP_S = 3_600.0
"""How long keys hold that cannot be fetched anew."""
MAX_BYTES = 1_000_000
"""Largest key set."""


class Keys:
    """Those of one issuer. One fetch at a time, which all who wait share."""

    def __init__(self, source: str, fetch_s: float = FETCH_S, clock: Callable[[], float] = time.monotonic):
        """`source` is a URL or a file with a JSON Web Key Set."""
        self._source = source
        self._fetch_s = fetch_s
        self._clock = clock
        self._set = KeySet([])
        self._document: Any = None
        self._tls: ssl.SSLContext | None = None
        self._fetched = self._tried = float("-inf")
        self._flight: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self.fault: str | None = None
        """Why the last fetch failed."""
        self.generation = 0
        """Changes whenever the keys do."""

    def start(self) -> None:
        """Fetch them now, and from time to time. Call it in an event loop."""
        self._refreshing = asyncio.create_task(self._refresh())

    def stop(self) -> None:
        for task in (self._refreshing, self._flight):
            if task is not None:
                task.cancel()

    def hold(self) -> bool:
        """Whether the keys are recent enough to accept a token."""
        return self._clock() - self._fetched <= KEEP_S

    async def held(self) -> KeySet:
        """The keys. Waits for one fetch if there have been none. Raises Refused if they do not hold."""
        if not self.hold():
            await self._fetch()
        if not self.hold():
            raise _away()
        return self._set

    async def newer(self) -> KeySet:
        """The keys after another fetch, for a token whose key is not among them; without one if the last was
        AGAIN_S ago or less. Raises Refused if the issuer is away, so that nobody knows."""
        await self._fetch()
        if self.fault is not None:
            raise _away()
        return self._set

    async def _refresh(self) -> None:
        while True:
            await self._fetch()
            await asyncio.sleep(AGAIN_S if self.fault else REFRESH_S)

    async def _fetch(self) -> None:
        """Fetch once, or wait for the fetch in flight. Does nothing if the last ended AGAIN_S ago or less."""
        if self._flight is None:
            if self._clock() - self._tried <= AGAIN_S:
                return
            self._flight = asyncio.create_task(self._fly())
        # A client that leaves must not end it for the others.
        await asyncio.shield(self._flight)

    async def _fly(self) -> None:
        try:
            async with asyncio.timeout(self._fetch_s):
                document = json.loads(await self._read())
                keys = KeySet.import_key_set(document)
        except Exception as error:  # whatever an issuer sends, or does not
            late = isinstance(error, TimeoutError)
            self._failed(f"no answer within {self._fetch_s:g} s" if late else f"{error!r:.300}")
        else:
            if self.fault is not None:
                log.info("the keys at %s are back", self._source)
            if document != self._document:
                self.generation += 1
            self._set, self._document, self._fetched, self.fault = keys, document, self._clock(), None
        finally:
            self._tried, self._flight = self._clock(), None

    def _failed(self, reason: str) -> None:
        fault = f"the keys at {self._source} cannot be fetched: {reason}"
        if self.fault is None:  # at each try it would fill the log
            until = (
                f"those of the last fetch hold for {KEEP_S:g} s" if self._document else "there are none yet"
            )
            log.warning("%s; %s", fault, until, exc_info=True)
        self.fault = fault

    async def _read(self) -> bytes:
        if not self._source.startswith(("http://", "https://")):
            return await asyncio.to_thread(Path(self._source).read_bytes)
        if self._tls is None:
            # It reads all the certificates there are, for longer than requests should be held up.
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        content = b""
        async with (
            httpx.AsyncClient(verify=self._tls, timeout=self._fetch_s, follow_redirects=False) as client,
            client.stream("GET", self._source) as answer,
        ):
            answer.raise_for_status()
            async for chunk in answer.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ValueError(f"a key set must not exceed {MAX_BYTES:,} bytes")
        return content


def _away() -> Refused:
    return Refused(503, "the issuer's keys cannot be fetched now; try again", headers={"retry-after": "5"})
