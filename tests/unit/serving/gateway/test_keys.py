"""Fetches of an issuer's keys from a real HTTP server."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from app.config.serving import Issuer
from app.serving.gateway import keys
from app.serving.gateway.auth import Authenticator
from app.serving.http import Refused

OLD, NEW = (ECKey.generate_key("P-256", {"alg": "ES256"}, auto_kid=True) for _ in range(2))


def bearer(key):
    claims = {"iss": "i", "aud": "raylway", "sub": "bob", "scope": "predict", "exp": int(time.time()) + 10**5}
    return "Bearer " + jwt.encode({"alg": "ES256", "kid": key.kid}, claims, key, algorithms=["ES256"])


class Server:
    """An issuer that serves a key set, hangs, sends it byte by byte, or sends something else.

    It answers in threads and closes after the client's event loop has ended, so that no stream belongs to a
    closed loop.
    """

    def __init__(self):
        self.keys = [OLD]
        self.mode = "answer"
        self.num_requests = 0
        self.release = threading.Event()

    def __enter__(self):
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                issuer.num_requests += 1
                with contextlib.suppress(OSError):
                    issuer._send(self.wfile)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing it waits for the answers
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks"
        return self

    def __exit__(self, *_):
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    async def wait_for_requests(self, count):
        async with asyncio.timeout(60):
            while self.num_requests < count:
                await asyncio.sleep(0.001)

    def _send(self, stream):
        document = json.dumps(KeySet(self.keys).as_dict(private=False)).encode()
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(document) + document
        match self.mode:
            case "hang":
                self.release.wait()
            case "late":
                self.release.wait()
                stream.write(answer)
            case "drip":
                stream.write(b"HTTP/1.1 200 OK\r\n\r\n")
                while not self.release.wait(0.01):
                    stream.write(b" ")
            case "500":
                stream.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")
            case "answer":
                stream.write(answer)
            case garbage:
                stream.write(b"HTTP/1.1 200 OK\r\n\r\n" + garbage)


class Clock:
    def __init__(self):
        self.now = 1e6

    def __call__(self):
        return self.now


def scene(play):
    """Run the coroutine function `play` with an issuer, an authenticator and its clock."""

    async def run(server):
        clock = Clock()
        authenticator = Authenticator(Issuer(issuer="i", jwks=server.url), 60, clock)
        try:
            return await play(server, authenticator, clock)
        finally:
            authenticator.keys.stop()

    with Server() as server:
        return asyncio.run(run(server))


async def status(authenticator, header):
    try:
        await authenticator.principal(header)
    except Refused as refused:
        return refused.status
    return 200


async def refresh(authenticator):
    """Run the periodic task for one fetch."""
    authenticator.keys.start()
    for _ in range(5):
        await asyncio.sleep(0)
    fetch_task = authenticator.keys._fetch_task
    if fetch_task is not None:
        await fetch_task
    authenticator.keys._refresh_task.cancel()


FAULTS = [
    "hang",
    "drip",
    "500",
    b"",
    b"[]",
    b'{"keys": 3}',
    b"[" * 100_000,
    b" " * (keys.MAX_KEY_SET_BYTES + 1),
]


@pytest.mark.parametrize("mode", FAULTS, ids=lambda mode: str(mode[:12]))
def test_while_the_issuer_fails_its_last_keys_are_valid_and_their_tokens_do_not_wait(mode):
    async def play(server, authenticator, clock):
        cached, uncached = bearer(OLD), bearer(OLD)
        assert await status(authenticator, cached) == 200
        server.mode = mode
        if mode in ("hang", "drip"):
            authenticator.keys._fetch_timeout_s = 0.1
        clock.now += keys.REFRESH_S + 1
        async with asyncio.timeout(60):
            while server.num_requests < 2:  # on a slow machine a fetch may time out before the issuer gets it
                clock.now += keys.MIN_INTERVAL_S + 1
                await refresh(authenticator)
        clock.now += keys.MIN_INTERVAL_S + 1
        authenticator.keys.start()
        await asyncio.sleep(0)
        assert authenticator.keys._fetch_task is not None
        # A fetch runs; these tokens do not wait for it.
        assert authenticator.cached(cached) is not None
        assert await status(authenticator, uncached) == 200
        await refresh(authenticator)
        assert "cannot be fetched" in authenticator.keys.fault
        assert authenticator.cached(cached) is not None
        clock.now += keys.MAX_AGE_S
        assert authenticator.cached(cached) is None
        assert await status(authenticator, cached) == 503
        server.mode, authenticator.keys._fetch_timeout_s = "answer", 60
        clock.now += keys.MIN_INTERVAL_S + 1
        assert await status(authenticator, cached) == 200
        assert authenticator.keys.fault is None

    scene(play)


def test_tokens_with_unknown_keys_share_one_fetch():
    async def play(server, authenticator, clock):
        assert await status(authenticator, bearer(OLD)) == 200
        server.mode = "hang"
        clock.now += keys.MIN_INTERVAL_S + 1
        unknown = [asyncio.create_task(status(authenticator, bearer(NEW))) for _ in range(20)]
        await server.wait_for_requests(2)
        assert await status(authenticator, bearer(OLD)) == 200, "a token with a known key does not wait"
        server.release.set()
        assert await asyncio.gather(*unknown) == [503] * 20
        # Soon after, they cause no further fetch.
        assert [await status(authenticator, bearer(NEW)) for _ in range(20)] == [503] * 20
        return server.num_requests

    assert scene(play) == 2


def test_a_client_that_disconnects_does_not_cancel_the_fetch_of_others():
    async def play(server, authenticator, clock):
        server.mode = "late"
        first = asyncio.create_task(status(authenticator, bearer(OLD)))
        await server.wait_for_requests(1)
        second = asyncio.create_task(status(authenticator, bearer(OLD)))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        server.release.set()
        return await second, server.num_requests

    assert scene(play) == (200, 1)


def test_a_new_key_is_fetched_when_a_token_names_it_but_not_too_often():
    async def play(server, authenticator, clock):
        assert await status(authenticator, bearer(OLD)) == 200
        server.keys = [OLD, NEW]
        assert await status(authenticator, bearer(NEW)) == 401
        assert server.num_requests == 1
        clock.now += keys.MIN_INTERVAL_S + 1
        assert await status(authenticator, bearer(NEW)) == 200
        assert await status(authenticator, bearer(OLD)) == 200, "tokens of the earlier key stay valid"

    scene(play)


@pytest.mark.parametrize("step_s", [-3600, 3600, -(10**8)])
def test_a_withdrawn_key_is_dropped_by_the_next_fetch_despite_clock_changes(monkeypatch, step_s):
    async def play(server, authenticator, clock):
        header = bearer(OLD)
        assert await status(authenticator, header) == 200
        server.keys = [NEW]
        changed_time = time.time() + step_s
        monkeypatch.setattr("app.serving.gateway.auth.time.time", lambda: changed_time)
        clock.now += keys.REFRESH_S + 1
        await refresh(authenticator)
        assert authenticator.cached(header) is None
        return await status(authenticator, header)

    assert scene(play) == 401


def test_fetching_the_same_keys_again_keeps_the_token_cache():
    async def play(server, authenticator, clock):
        header = bearer(OLD)
        await authenticator.principal(header)
        clock.now += keys.REFRESH_S + 1
        await refresh(authenticator)
        assert server.num_requests == 2
        return authenticator.cached(header)

    assert scene(play) is not None


def test_without_keys_tokens_are_refused_with_503_instead_of_401():
    async def play(server, authenticator, clock):
        server.mode = "500"
        statuses = [await status(authenticator, bearer(OLD)) for _ in range(3)]
        return statuses, server.num_requests

    assert scene(play) == ([503] * 3, 1)


def test_keys_can_come_from_a_file(tmp_path):
    path = tmp_path / "jwks.json"
    authenticator = Authenticator(Issuer(issuer="i", jwks=str(path)))
    assert asyncio.run(status(authenticator, bearer(OLD))) == 503
    path.write_text(json.dumps(KeySet([OLD]).as_dict(private=False)))
    authenticator = Authenticator(Issuer(issuer="i", jwks=str(path)))
    assert asyncio.run(status(authenticator, bearer(OLD))) == 200
