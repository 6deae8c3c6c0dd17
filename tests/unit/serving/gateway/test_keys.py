"""The issuer's keys: what is fetched when, and who waits for it. The issuer is a real server."""

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
    """An issuer that serves a key set, or hangs, drips, or sends something else.

    It answers in threads and closes after the client's event loop has ended, so it leaves no stream to a loop
    that is closed.
    """

    def __init__(self):
        self.keys = [OLD]
        self.mode = "answer"
        self.asked = 0
        self.let_go = threading.Event()

    def __enter__(self):
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                issuer.asked += 1
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
        self.let_go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    async def wait_until_asked(self, times):
        async with asyncio.timeout(60):
            while self.asked < times:
                await asyncio.sleep(0.001)

    def _send(self, stream):
        document = json.dumps(KeySet(self.keys).as_dict(private=False)).encode()
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(document) + document
        match self.mode:
            case "hang":
                self.let_go.wait()
            case "late":
                self.let_go.wait()
                stream.write(answer)
            case "drip":
                stream.write(b"HTTP/1.1 200 OK\r\n\r\n")
                while not self.let_go.wait(0.01):
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
    """Plays it with an issuer, an authenticator and its clock."""

    async def run(server):
        clock = Clock()
        checked = Authenticator(Issuer(issuer="i", jwks=server.url), 60, clock)
        try:
            return await play(server, checked, clock)
        finally:
            checked.keys.stop()

    with Server() as server:
        return asyncio.run(run(server))


async def status(checked, header):
    try:
        await checked.principal(header)
    except Refused as refused:
        return refused.status
    return 200


async def refresh(checked):
    """One turn of the task that fetches from time to time."""
    checked.keys.start()
    for _ in range(5):
        await asyncio.sleep(0)
    flight = checked.keys._flight
    if flight is not None:
        await flight
    checked.keys._refreshing.cancel()


BROKEN = ["hang", "drip", "500", b"", b"[]", b'{"keys": 3}', b"[" * 100_000, b" " * (keys.MAX_BYTES + 1)]


@pytest.mark.parametrize("mode", BROKEN, ids=lambda mode: str(mode[:12]))
def test_while_the_issuer_is_away_known_keys_hold_and_nobody_with_one_waits(mode):
    async def play(server, checked, clock):
        known, unseen = bearer(OLD), bearer(OLD)
        assert await status(checked, known) == 200
        server.mode = mode
        if mode in ("hang", "drip"):
            checked.keys._fetch_s = 0.1
        clock.now += keys.REFRESH_S + 1
        async with asyncio.timeout(60):
            while server.asked < 2:  # on a loaded machine the limit may pass before the issuer is asked
                clock.now += keys.AGAIN_S + 1
                await refresh(checked)
        clock.now += keys.AGAIN_S + 1
        checked.keys.start()
        await asyncio.sleep(0)
        assert checked.keys._flight is not None
        # A fetch is in flight; these are answered without another.
        assert checked.known(known) is not None
        assert await status(checked, unseen) == 200
        await refresh(checked)
        assert "cannot be fetched" in checked.keys.fault
        assert checked.known(known) is not None
        clock.now += keys.KEEP_S
        assert checked.known(known) is None
        assert await status(checked, known) == 503
        server.mode, checked.keys._fetch_s = "answer", 60
        clock.now += keys.AGAIN_S + 1
        assert await status(checked, known) == 200
        assert checked.keys.fault is None

    scene(play)


def test_strangers_share_one_fetch_and_are_refused_by_its_end():
    async def play(server, checked, clock):
        assert await status(checked, bearer(OLD)) == 200
        server.mode = "hang"
        clock.now += keys.AGAIN_S + 1
        strangers = [asyncio.create_task(status(checked, bearer(NEW))) for _ in range(20)]
        await server.wait_until_asked(2)
        assert await status(checked, bearer(OLD)) == 200, "not behind the strangers"
        server.let_go.set()
        assert await asyncio.gather(*strangers) == [503] * 20
        # And none of them has another fetch made soon after.
        assert [await status(checked, bearer(NEW)) for _ in range(20)] == [503] * 20
        return server.asked

    assert scene(play) == 2


def test_a_client_that_leaves_does_not_end_the_fetch_for_others():
    async def play(server, checked, clock):
        server.mode = "late"
        first = asyncio.create_task(status(checked, bearer(OLD)))
        await server.wait_until_asked(1)
        second = asyncio.create_task(status(checked, bearer(OLD)))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        server.let_go.set()
        return await second, server.asked

    assert scene(play) == (200, 1)


def test_a_new_key_is_fetched_when_it_is_first_seen_and_not_for_every_stranger():
    async def play(server, checked, clock):
        assert await status(checked, bearer(OLD)) == 200
        server.keys = [OLD, NEW]
        assert await status(checked, bearer(NEW)) == 401
        assert server.asked == 1
        clock.now += keys.AGAIN_S + 1
        assert await status(checked, bearer(NEW)) == 200
        assert await status(checked, bearer(OLD)) == 200, "tokens of the key before stay good"

    scene(play)


@pytest.mark.parametrize("step_s", [-3600, 3600, -(10**8)])
def test_a_withdrawn_key_goes_with_the_next_fetch_whatever_the_wall_clock_does(monkeypatch, step_s):
    async def play(server, checked, clock):
        header = bearer(OLD)
        assert await status(checked, header) == 200
        server.keys = [NEW]
        stepped = time.time() + step_s
        monkeypatch.setattr("app.serving.gateway.auth.time.time", lambda: stepped)
        clock.now += keys.REFRESH_S + 1
        await refresh(checked)
        assert checked.known(header) is None
        return await status(checked, header)

    assert scene(play) == 401


def test_the_same_keys_again_keep_what_is_known():
    async def play(server, checked, clock):
        header = bearer(OLD)
        await checked.principal(header)
        clock.now += keys.REFRESH_S + 1
        await refresh(checked)
        assert server.asked == 2
        return checked.known(header)

    assert scene(play) is not None


def test_without_keys_nobody_is_told_that_the_token_is_bad():
    async def play(server, checked, clock):
        server.mode = "500"
        given = [await status(checked, bearer(OLD)) for _ in range(3)]
        return given, server.asked

    assert scene(play) == ([503] * 3, 1)


def test_a_file(tmp_path):
    path = tmp_path / "jwks.json"
    checked = Authenticator(Issuer(issuer="i", jwks=str(path)))
    assert asyncio.run(status(checked, bearer(OLD))) == 503
    path.write_text(json.dumps(KeySet([OLD]).as_dict(private=False)))
    checked = Authenticator(Issuer(issuer="i", jwks=str(path)))
    assert asyncio.run(status(checked, bearer(OLD))) == 200
