"""The issuer's keys: what is fetched when, and who waits for it. The issuer is a real server."""

import asyncio
import contextlib
import json
import time

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from app.config.serving import Issuer
from app.serving import keys
from app.serving.auth import Authenticator
from app.serving.protocol import Refused

OLD, NEW = (ECKey.generate_key("P-256", {"alg": "ES256"}, auto_kid=True) for _ in range(2))


def bearer(key):
    claims = {"iss": "i", "aud": "raylway", "sub": "bob", "scope": "predict", "exp": int(time.time()) + 10**5}
    return "Bearer " + jwt.encode({"alg": "ES256", "kid": key.kid}, claims, key, algorithms=["ES256"])


class Server:
    """An issuer that serves a key set, or hangs, drips, or sends something else."""

    def __init__(self):
        self.keys = [OLD]
        self.mode = "answer"
        self.asked = 0
        self.let_go = asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/jwks"
        return self

    async def __aexit__(self, *_):
        self.let_go.set()
        self._server.close()

    async def _answer(self, reader, writer):
        self.asked += 1
        await reader.readuntil(b"\r\n\r\n")
        document = json.dumps(KeySet(self.keys).as_dict(private=False)).encode()
        with contextlib.suppress(OSError):
            await self._send(writer, document)
            writer.close()

    async def _send(self, writer, document):
        match self.mode:
            case "hang":
                await self.let_go.wait()
            case "drip":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                while not self.let_go.is_set():
                    writer.write(b" ")
                    await asyncio.sleep(0.01)
            case "500":
                writer.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")
            case "answer":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(document) + document)
            case garbage:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + garbage)


class Clock:
    def __init__(self):
        self.now = 1e6

    def __call__(self):
        return self.now


def scene(play):
    """Plays it with an issuer, an authenticator and its clock."""

    async def run():
        async with Server() as server:
            clock = Clock()
            checked = Authenticator(Issuer(issuer="i", jwks=server.url), 30, clock)
            return await play(server, checked, clock)

    return asyncio.run(run())


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
        server.mode, checked.keys._fetch_s = mode, 0.1
        clock.now += keys.REFRESH_S + 1
        checked.keys.start()
        async with asyncio.timeout(10):
            while server.asked < 2:
                await asyncio.sleep(0.001)
        # The fetch is in flight, or has failed; either way these are answered without another.
        assert checked.known(known) is not None
        assert await status(checked, unseen) == 200
        if checked.keys._flight is not None:
            await checked.keys._flight
        assert "cannot be fetched" in checked.keys.fault
        assert checked.known(known) is not None
        clock.now += keys.KEEP_S
        assert checked.known(known) is None
        assert await status(checked, known) == 503
        server.mode, checked.keys._fetch_s = "answer", 30
        clock.now += keys.AGAIN_S + 1
        assert await status(checked, known) == 200
        assert checked.keys.fault is None
        checked.keys.stop()

    scene(play)


def test_strangers_share_one_fetch_and_are_refused_by_its_end():
    async def play(server, checked, clock):
        assert await status(checked, bearer(OLD)) == 200
        server.mode, checked.keys._fetch_s = "hang", 0.5
        clock.now += keys.AGAIN_S + 1
        strangers = [asyncio.create_task(status(checked, bearer(NEW))) for _ in range(20)]
        while server.asked < 2:
            await asyncio.sleep(0.001)
        assert await status(checked, bearer(OLD)) == 200, "not behind the strangers"
        assert await asyncio.gather(*strangers) == [503] * 20
        # And none of them has another fetch made soon after.
        assert [await status(checked, bearer(NEW)) for _ in range(20)] == [503] * 20
        return server.asked

    assert scene(play) == 2


def test_a_client_that_leaves_does_not_end_the_fetch_for_others():
    async def play(server, checked, clock):
        first = asyncio.create_task(status(checked, bearer(OLD)))
        while not server.asked:
            await asyncio.sleep(0)
        second = asyncio.create_task(status(checked, bearer(OLD)))
        await asyncio.sleep(0)
        first.cancel()
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
        monkeypatch.setattr("app.serving.auth.time.time", lambda: stepped)
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
