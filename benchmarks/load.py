"""Load on an endpoint: a closed loop by wrk, an open loop by MLPerf LoadGen (Server scenario: Poisson)."""

import asyncio
import math
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SCRIPT = """
local bodies = {}
for line in io.lines("%s") do
  bodies[#bodies + 1] = wrk.format("POST", "%s", {%s}, line)
end
local turn = 0
request = function()
  turn = turn %% #bodies + 1
  return bodies[turn]
end
done = function(summary, latency, requests)
  io.write(string.format("\\n%%d %%d %%d %%d\\n", summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout,
    latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Target:
    """A URL and the bodies that are posted to it in turn."""

    url: str
    bodies: Sequence[bytes]
    """JSON documents, each on one line."""
    headers: tuple[tuple[str, str], ...] = ()

    def requests(self) -> list[bytes]:
        """The HTTP requests as bytes, one for each body."""
        url = urlsplit(self.url)
        headers = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return [
            f"POST {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\n"
            f"{headers}content-length: {len(body)}\r\n\r\n".encode()
            + body
            for body in self.bodies
        ]


class NotAnswered(Exception):
    """Some requests got no 2xx answer."""


@dataclass(frozen=True)
class ClosedLoopResult:
    requests_per_s: float
    p99_s: float


def closed_loop(target: Target, *, seconds: float, connections: int = 16) -> ClosedLoopResult:
    """Each connection sends its next request as soon as the last one is answered. Raises NotAnswered."""
    url = urlsplit(target.url)
    with tempfile.TemporaryDirectory() as folder:
        bodies, script = Path(folder) / "bodies", Path(folder) / "script.lua"
        bodies.write_bytes(b"\n".join(target.bodies))
        headers = (("host", url.netloc), ("content-type", "application/json"), *target.headers)
        script.write_text(
            SCRIPT % (bodies, url.path, ", ".join(f'["{name}"]="{value}"' for name, value in headers))
        )
        command = ["wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s", "-s", str(script), target.url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration_us, errors, p99_us = map(int, output.strip().splitlines()[-1].split())
    if errors:
        raise NotAnswered(f"{errors} of {requests} requests to {target.url} got no 2xx answer:\n{output}")
    return ClosedLoopResult(requests / duration_us * 1e6, p99_us / 1e6)


@dataclass(frozen=True)
class OpenLoopResult:
    p50_s: float
    p99_s: float


def open_loop(target: Target, *, per_s: float, seconds: float) -> OpenLoopResult:
    """Requests arrive as a Poisson process, whether earlier ones are answered or not.

    The latency of a request counts from the time at which it was due. Raises NotAnswered.
    """
    import mlperf_loadgen as loadgen

    with tempfile.TemporaryDirectory() as folder, _Client(target) as client:
        settings = loadgen.TestSettings()
        settings.scenario = loadgen.TestScenario.Server
        settings.mode = loadgen.TestMode.PerformanceOnly
        settings.server_target_qps = per_s
        settings.server_target_latency_ns = 10**10
        settings.min_duration_ms = settings.max_duration_ms = int(seconds * 1000)
        settings.min_query_count = 1
        logs = loadgen.LogSettings()
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False

        def issue(samples: list) -> None:
            for sample in samples:
                client.send(sample.index, partial(_complete, loadgen, sample.id))

        sut = loadgen.ConstructSUT(issue, lambda: None)
        count = len(target.bodies)
        library = loadgen.ConstructQSL(count, count, lambda _: None, lambda _: None)
        loadgen.StartTestWithLogSettings(sut, library, settings, logs)
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    if client.failed:
        raise NotAnswered(f"{client.failed} requests to {target.url} got no 2xx answer")
    latencies = {
        p: re.search(rf"^{p}\.00 percentile latency \(ns\)\s*:\s*(\d+)", summary, re.M) for p in (50, 99)
    }
    return OpenLoopResult(*(int(match[1]) / 1e9 for match in latencies.values()))


def _complete(loadgen: Any, sample: int) -> None:
    loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample, 0, 0)])


@dataclass(frozen=True)
class HammerResult:
    """The answers that many clients got."""

    statuses: Counter[int]
    answered_per_s: float
    """Answers with status 200 per second."""
    p99_s: float
    """99th percentile of the latency of the answers with status 200."""


async def hammer(target: Target, *, connections: int, seconds: float) -> HammerResult:
    """Each connection sends its next request as soon as the last one is answered with 200. After any other
    status it waits for 0.25 s, which is less than the Retry-After of a 429."""
    url, requests = urlsplit(target.url), target.requests()
    statuses: Counter[int] = Counter()
    latencies: list[float] = []

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        end = time.monotonic() + seconds  # after the connection is open: opening thousands takes seconds
        while (sent := time.monotonic()) < end:
            number += 1
            writer.write(requests[number % len(requests)])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: *(\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            status = int(head.split(b" ", 2)[1])
            statuses[status] += 1
            if status == 200:
                latencies.append(time.monotonic() - sent)
            else:
                await asyncio.sleep(0.25)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(connections)))
    ranked = sorted(latencies) or [math.nan]
    return HammerResult(statuses, len(latencies) / seconds, ranked[int(0.99 * (len(ranked) - 1))])


class _Client:
    """Sends requests over keep-alive connections: as many as needed, each for one request at a time."""

    def __init__(self, target: Target):
        url = urlsplit(target.url)
        self._address = (url.hostname or "", url.port or 80)
        self._requests = target.requests()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.failed = 0

    def __enter__(self) -> "_Client":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _, writer in self._idle:
            self._loop.call_soon_threadsafe(writer.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def send(self, index: int, done: Callable[[], None]) -> None:
        """Send a body; `done` is called when the answer has arrived or the request has failed."""
        self._loop.call_soon_threadsafe(self._start, index, done)

    def _start(self, index: int, done: Callable[[], None]) -> None:
        task = self._loop.create_task(self._exchange(self._requests[index], done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _exchange(self, request: bytes, done: Callable[[], None]) -> None:
        try:
            while self._idle and self._idle[-1][0].at_eof():
                self._idle.pop()  # the server has closed this idle connection
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: *(\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            self.failed += not head.startswith(b"http/1.1 2")
            if b"\r\nconnection: close\r\n" in head:
                writer.close()
            else:
                self._idle.append((reader, writer))
        except (OSError, EOFError):  # EOFError: the connection was closed without an answer
            self.failed += 1
        finally:
            done()
