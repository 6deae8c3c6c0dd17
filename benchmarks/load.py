"""Load on an endpoint: wrk in a closed loop, MLPerf LoadGen's Server scenario (Poisson) in an open one."""

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
    """What is asked, in turns."""

    url: str
    bodies: Sequence[bytes]
    """JSON, each on one line."""
    headers: tuple[tuple[str, str], ...] = ()

    def requests(self) -> list[bytes]:
        """As they are sent, one for each body."""
        url = urlsplit(self.url)
        headers = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return [
            f"POST {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\n"
            f"{headers}content-length: {len(body)}\r\n\r\n".encode()
            + body
            for body in self.bodies
        ]


class NotAnswered(Exception):
    """Some requests got no 2xx."""


@dataclass(frozen=True)
class Closed:
    requests_per_s: float
    p99_s: float


def closed_loop(target: Target, *, seconds: float, connections: int = 16) -> Closed:
    """Each connection asks again as soon as it is answered. Raises NotAnswered."""
    url = urlsplit(target.url)
    with tempfile.TemporaryDirectory() as folder:
        bodies, script = Path(folder) / "bodies", Path(folder) / "script.lua"
        bodies.write_bytes(b"\n".join(target.bodies))
        headers = (("host", url.netloc), ("content-type", "application/json"), *target.headers)
        script.write_text(
            SCRIPT % (bodies, url.path, ", ".join(f'["{name}"]="{value}"' for name, value in headers))
        )
        command = ["wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s", "-s", str(script), target.url]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration_us, errors, p99_us = map(int, said.strip().splitlines()[-1].split())
    if errors:
        raise NotAnswered(f"{errors} of {requests} answers of {target.url} were none:\n{said}")
    return Closed(requests / duration_us * 1e6, p99_us / 1e6)


@dataclass(frozen=True)
class Open:
    p50_s: float
    p99_s: float


def open_loop(target: Target, *, per_s: float, seconds: float) -> Open:
    """Requests come when they come, as of a Poisson process, whether earlier ones are answered or not.

    The latency counts from when a request was due. Raises NotAnswered.
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
                client.ask(sample.index, partial(_complete, loadgen, sample.id))

        sut = loadgen.ConstructSUT(issue, lambda: None)
        count = len(target.bodies)
        library = loadgen.ConstructQSL(count, count, lambda _: None, lambda _: None)
        loadgen.StartTestWithLogSettings(sut, library, settings, logs)
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    if client.refused:
        raise NotAnswered(f"{client.refused} answers of {target.url} were none")
    found = {
        p: re.search(rf"^{p}\.00 percentile latency \(ns\)\s*:\s*(\d+)", summary, re.M) for p in (50, 99)
    }
    return Open(*(int(match[1]) / 1e9 for match in found.values()))


def _complete(loadgen: Any, sample: int) -> None:
    loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample, 0, 0)])


@dataclass(frozen=True)
class Hammered:
    """What many clients got."""

    statuses: Counter[int]
    answered_per_s: float
    """With 200."""
    p99_s: float
    """Of those."""


async def hammer(target: Target, *, connections: int, seconds: float) -> Hammered:
    """Each connection asks again as soon as it is answered; who is told 429 waits for a quarter of a second,
    which is less than it was asked to."""
    url, requests = urlsplit(target.url), target.requests()
    statuses: Counter[int] = Counter()
    latencies: list[float] = []

    async def ask(number: int) -> None:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        end = time.monotonic() + seconds  # to open thousands takes seconds, too
        while (now := time.monotonic()) < end:
            number += 1
            writer.write(requests[number % len(requests)])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: *(\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            status = int(head.split(b" ", 2)[1])
            statuses[status] += 1
            if status == 200:
                latencies.append(time.monotonic() - now)
            else:
                await asyncio.sleep(0.25)
        writer.close()

    await asyncio.gather(*(ask(number) for number in range(connections)))
    ranked = sorted(latencies) or [math.nan]
    return Hammered(statuses, len(latencies) / seconds, ranked[int(0.99 * (len(ranked) - 1))])


class _Client:
    """Requests over kept connections: as many as are needed, each used by one request at a time."""

    def __init__(self, target: Target):
        url = urlsplit(target.url)
        self._address = (url.hostname or "", url.port or 80)
        self._requests = target.requests()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.refused = 0

    def __enter__(self) -> "_Client":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _, writer in self._idle:
            self._loop.call_soon_threadsafe(writer.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def ask(self, index: int, done: Callable[[], None]) -> None:
        """Send a body; `done` is called when its answer is there."""
        self._loop.call_soon_threadsafe(self._begin, index, done)

    def _begin(self, index: int, done: Callable[[], None]) -> None:
        task = self._loop.create_task(self._ask(self._requests[index], done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, request: bytes, done: Callable[[], None]) -> None:
        try:
            while self._idle and self._idle[-1][0].at_eof():
                self._idle.pop()  # the server has closed it, after a time without a request
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: *(\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            self.refused += not head.startswith(b"http/1.1 2")
            if b"\r\nconnection: close\r\n" in head:
                writer.close()
            else:
                self._idle.append((reader, writer))
        except (OSError, EOFError):  # an EOF is a connection closed without an answer
            self.refused += 1
        finally:
            done()
