"""An hour of everything at once on one cluster, driven only by the commands and HTTP.

Clients predict and give feedback while replicas and HAProxy are killed, slow and malformed requests arrive,
load rises tenfold in bursts, and operators train, promote, shift traffic, sign, compress, predict and deploy.
It holds if no request is lost after one retry (after a kill of HAProxy: after retries until its successor
listens), if every command ends with a documented exit code, and if nothing grows.

Growth compares the median of the last quarter of the time with the median of the second, for processes that
were alive in both. The first quarter is warm-up.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from load import Target, hammer

from app.bundle.manifest import verify
from app.cluster import session
from app.cluster.ports import free_ports
from app.cluster.record import read_record
from app.registry import versions
from app.state.records import Records

ROOT = Path(__file__).parents[1]
PROJECT = "configs/smoke.yaml"
NAME = "smoke"
BASE = f"/v2/models/{NAME}"
HOUR_S = 3600.0
RETRY_S = 1.0
"""A client waits this long before its one retry."""
MAX_AWAY_S = 20.0
"""Maximum time after a kill of HAProxy until its successor must listen."""
REQUESTS_PER_S = 20
BURST_CONNECTIONS = 640
SAMPLE_S = 10.0
MAX_GROWTH = 0.10
"""Growth of a process's memory or of a count that is tolerated, relative to the second quarter."""
MAX_GROWTH_MB = 30.0
"""Growth of memory that is tolerated in any case."""
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Run:
    """The state that the actors share, with the counts and faults that they record."""

    url: str
    token: str
    head: psutil.Process
    settings: list[str]
    folder: Path
    services: Path
    """Ray's service discovery file for Prometheus."""
    ended: threading.Event = field(default_factory=threading.Event)
    bursting: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    away_s: float = 0.0
    """Longest time until a client whose connection failed was answered."""
    haproxy_killed_s: float = float("-inf")
    """Time of the last kill of HAProxy, by the monotonic clock."""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def fault(self, text: str) -> None:
        print(f"  FAULT: {text}", file=sys.stderr, flush=True)
        self.faults.append(text)


def everything(scale: float) -> dict[str, Any]:
    """Run all actors at once for an hour times `scale`."""
    with tempfile.TemporaryDirectory(prefix="raylway-everything-") as folder:
        run = _start(Path(folder))
        mark = _environment(run.head)[session.MARK]
        try:
            actors = [threading.Thread(target=_repeat, args=(run, actor, s)) for actor, s in ACTORS.items()]
            growth = Growth(run)
            for thread in actors:
                thread.start()
            growth.watch(HOUR_S * scale)
            run.ended.set()
            for thread in actors:
                thread.join()
            try:
                _check_state(run)
            except Exception as error:  # report the results of the hour in any case
                run.fault(f"state after the run: {type(error).__name__}: {str(error)[-800:]}")
        finally:
            run.ended.set()
            _raylway("down")
        _check_no_process_left(run, mark)
    grown = growth.grown()
    return {
        "counts": dict(sorted(run.counts.items())),
        "longest_away_s": round(run.away_s, 1),
        "growth": growth.figures(),
        "grown": grown,
        "faults": run.faults[:20],
        "holds": not run.faults and not grown and not run.counts["lost"],
    }


def _start(folder: Path) -> Run:
    """Start a cluster that serves a champion and a challenger."""
    port = free_ports(1)[0]
    settings = [
        f"serving.port={port}", "serving.auth=local", "serving.follow=true", "serving.num_cpus=0.1",
        "serving.autoscaling={min_replicas: 2, max_replicas: 2}",
        "serving.limits.feedback_per_hour=1000000000",
        "training.num_workers=1", "training.num_cpus=0.5", "training.epochs=2", "gate.tolerance=1",
    ]  # fmt: skip
    settings = [part for setting in settings for part in ("--set", setting)]
    _raylway("up")
    head = read_record()
    assert head
    for seed in (0, 1):
        _raylway("train", PROJECT, *settings, "--set", f"seed={seed}")
    _raylway("serve", PROJECT, *settings)
    token = _raylway("token", "soak", "--scopes", "predict feedback explain admin").stdout.strip()
    url = f"http://127.0.0.1:{port}"
    key = folder / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    os.environ["RAYLWAY_SIGNING_KEY"] = str(key)
    services = Path(head.directory) / "ray" / "prom_metrics_service_discovery.json"
    return Run(url, token, psutil.Process(head.pid), settings, folder, services)


def _raylway(*arguments: str, allowed: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    output = process.stdout + process.stderr
    if process.returncode not in allowed or TRACEBACK in output:
        end = output.strip()[-600:]
        raise RuntimeError(f"`raylway {' '.join(arguments)}` ended with {process.returncode}: {end}")
    return process


def _repeat(run: Run, actor: Callable[[Run, random.Random], None], pause_s: float) -> None:
    rng = random.Random(actor.__name__)
    while not run.ended.wait(pause_s * rng.uniform(0.5, 1.5)):
        try:
            actor(run, rng)
        except Exception as error:
            run.fault(f"{actor.__name__}: {type(error).__name__}: {str(error)[-800:]}")


# The actors: each is called repeatedly, with a pause between two calls.


def clients(run: Run, rng: random.Random) -> None:
    """Send requests at a constant rate for ten seconds, a quarter of them followed by feedback."""
    asyncio.run(_clients(run, rng, 10.0))


async def _clients(run: Run, rng: random.Random, seconds: float) -> None:
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(
        base_url=run.url, headers=run.headers, trust_env=False, timeout=30, limits=limits
    ) as client:
        tasks = []
        for _ in range(round(seconds * REQUESTS_PER_S)):
            tasks.append(asyncio.create_task(_send(run, client, rng.random(), rng.randrange(10**12))))
            await asyncio.sleep(1 / REQUESTS_PER_S)
        await asyncio.gather(*tasks)


async def _send(run: Run, client: httpx.AsyncClient, draw: float, number: int) -> None:
    """Send a prediction request and, if `draw` is below 0.25, feedback for it."""
    headers = {"x-request-id": f"soak-{number}"}
    body = {"rows": [_row(number)], "unit": f"user-{number % 500}"}
    if not await _answered(run, client, "/predict", body, headers):
        return
    if draw < 0.25:
        feedback = {"request_id": headers["x-request-id"], "reward": draw}
        await _answered(run, client, "/feedback", feedback, {})


async def _answered(
    run: Run, client: httpx.AsyncClient, action: str, body: Any, headers: dict[str, str]
) -> bool:
    """Whether the first or second try is answered with 2xx. While HAProxy is being replaced, more follow."""
    burst, started, tries, failed = run.bursting.is_set(), time.monotonic(), 0, False
    while tries < 2 or time.monotonic() - run.haproxy_killed_s < MAX_AWAY_S:
        tries += 1
        run.counts[f"{action} tries"] += 1
        try:
            response = await client.post(BASE + action, json=body, headers=headers)
        except httpx.TransportError as error:
            run.counts[f"{action} {type(error).__name__}"] += 1
            failed = True
        else:
            run.counts[f"{action} {response.status_code}"] += 1
            if response.is_success:
                if failed:
                    run.away_s = max(run.away_s, time.monotonic() - started)
                return True
            if response.status_code not in (429, 503):
                run.fault(f"{action}: {response.status_code} {response.text[:300]}")
        await asyncio.sleep(RETRY_S)
    run.counts["lost in a burst" if burst or run.bursting.is_set() else "lost"] += 1
    return False


def _row(number: int) -> dict[str, Any]:
    return {
        "age": 20 + number % 60, "workclass": [None, "Private", "never seen"][number % 3],
        "educational-num": 1 + number % 16, "marital-status": "Divorced",
        "gender": ["Female", "Male"][number % 2], "hours-per-week": number % 100,
    }  # fmt: skip


def stalls(run: Run, rng: random.Random) -> None:
    """Open connections without a token, send a part of a request on each, and then send nothing."""
    host, port = run.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as connections:
        for _ in range(40):
            try:
                connection = connections.enter_context(contextlib.closing(_connect(host, int(port))))
            except ConnectionRefusedError:
                return  # HAProxy is being replaced
            head = f"POST {BASE}/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            part = head + f"content-length: 900000\r\n\r\n{'x' * rng.randrange(40_000)}"
            with contextlib.suppress(OSError):
                connection.sendall(part[: rng.randrange(20, len(part))].encode())
        run.counts["stalled connections"] += 40
        run.ended.wait(20)


def _connect(host: str, port: int) -> Any:
    import socket

    return socket.create_connection((host, port), timeout=10)


def malformed(run: Run, rng: random.Random) -> None:
    """Send a malformed request. It must get a 4xx, a 503 (no replica right now), or a closed connection."""
    bodies = [
        b"", b"\xff\xfe", b"null", b"[" * 50_000, b'{"rows": []}', b'{"rows": [{"age": 1e999}]}',
        b'{"rows": [{"gender": "\\ud800"}]}', b'{"unit": "' + b"x" * 200_000 + b'"}', b"0" * 2_000_000,
    ]  # fmt: skip
    action = rng.choice(["/predict", "/infer", "/feedback", "/explain", "/nothing"])
    headers = {**run.headers, "content-type": "application/json"}
    if rng.random() < 0.3:
        headers["authorization"] = rng.choice(["", "Bearer x", "Bearer " + "a.b.c" * 500])
    try:
        response = httpx.post(
            run.url + BASE + action,
            content=rng.choice(bodies),
            headers=headers,
            trust_env=False,
            timeout=30,
        )
    except httpx.TransportError:
        run.counts["malformed: closed"] += 1
        return
    run.counts[f"malformed: {response.status_code}"] += 1
    if response.status_code // 100 != 4 and response.status_code != 503:
        run.fault(f"malformed {action}: {response.status_code} {response.text[:300]}")


def bursts(run: Run, rng: random.Random) -> None:
    """Send ten times as many requests as the replicas can take, for ten seconds."""
    bodies = [json.dumps({"rows": [_row(n)]}).encode() for n in range(64)]
    target = Target(run.url + BASE + "/predict", bodies, tuple(run.headers.items()))
    run.bursting.set()
    try:
        result = asyncio.run(hammer(target, connections=BURST_CONNECTIONS, seconds=10))
        for status, count in result.statuses.items():
            run.counts[f"burst: {status}"] += count
            if status not in (200, 429, 503):
                run.fault(f"burst: {count} answers {status}")
    except (OSError, asyncio.IncompleteReadError) as error:
        run.counts[f"burst: {type(error).__name__}"] += 1  # a process was killed meanwhile
    finally:
        time.sleep(2 * RETRY_S)
        run.bursting.clear()


def kills(run: Run, rng: random.Random) -> None:
    """Kill a replica or, one time in ten, HAProxy."""
    kind = "haproxy" if rng.random() < 0.1 else f"ServeReplica:{NAME}:"
    candidates = [p for p in _processes(run) if kind in _title(p)]
    if candidates:
        with contextlib.suppress(psutil.Error):
            if kind == "haproxy":
                run.haproxy_killed_s = time.monotonic()
            rng.choice(candidates).kill()
            run.counts[f"killed {kind}"] += 1


def scrapes(run: Run, rng: random.Random) -> None:
    """Scrape as Prometheus does: Ray's agent drops the metrics of dead workers only when it is scraped."""
    for service in json.loads(run.services.read_text()):
        for target in service["targets"]:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://{target}/metrics", trust_env=False, timeout=30).raise_for_status()
                run.counts["scrapes"] += 1


def operators(run: Run, rng: random.Random) -> None:
    """Run a command. Exit code 2: impossible in this state. Exit code 3: the gate refused the version."""
    command = rng.choice(list(COMMANDS))
    arguments, allowed = COMMANDS[command](run, rng)
    process = _raylway(command, *arguments, allowed=allowed)
    run.counts[f"raylway {command}: {process.returncode}"] += 1


def _train(run: Run, rng: random.Random) -> tuple[list[str], tuple[int, ...]]:
    seed = f"seed={rng.randrange(20)}"
    return [PROJECT, *run.settings, "--set", seed], (0, 3)


def _compress(run: Run, rng: random.Random) -> tuple[list[str], tuple[int, ...]]:
    return [str(versions.resolve(NAME, "champion").path), "--register"], (0, 2)


def _sweep(run: Run, rng: random.Random) -> tuple[list[str], tuple[int, ...]]:
    study = f"sweep.study=soak-{rng.randrange(10**9)}"
    return [PROJECT, *run.settings, "--trials", "2", "--set", study], (0,)


def _predict(run: Run, rng: random.Random) -> tuple[list[str], tuple[int, ...]]:
    table = run.folder / "rows.parquet"
    if not table.exists():
        import pandas as pd

        pd.DataFrame([_row(n) for n in range(2_000)]).to_parquet(table)
    output = str(run.folder / f"predicted-{rng.randrange(10**9)}")
    return [f"{NAME}@champion", "--input", str(table), "--output", output], (0,)


COMMANDS: dict[str, Callable[[Run, random.Random], tuple[list[str], tuple[int, ...]]]] = {
    "train": _train,
    "serve": lambda run, rng: ([PROJECT, *run.settings], (0,)),
    "traffic": lambda run, rng: ([NAME, "--champion", str(rng.randrange(1, 100))], (0,)),
    "promote": lambda run, rng: ([NAME, "challenger"], (0, 2)),
    "compress": _compress,
    "predict": _predict,
    "sweep": _sweep,
    "sign": lambda run, rng: ([f"{NAME}@champion"], (0,)),
    "token": lambda run, rng: (["somebody"], (0,)),
    "status": lambda run, rng: (["--json"], (0,)),
    "audit": lambda run, rng: ([], (0,)),
    "versions": lambda run, rng: ([NAME], (0,)),
}

ACTORS: dict[Callable[[Run, random.Random], None], float] = {
    clients: 0.1, stalls: 30.0, malformed: 0.5, bursts: 240.0, kills: 30.0, scrapes: 15.0, operators: 5.0,
}  # fmt: skip
"""Mean pause between two calls of each actor, in seconds."""


# The state after the run


def _check_state(run: Run) -> None:
    """The audit log and every version verify, and no temporary file is left in the state directory."""
    _raylway("audit")
    for version in versions.versions(NAME):
        verify(versions.resolve(NAME, str(version.version)).path)
    state = Path(os.environ["RAYLWAY_HOME"])
    linked = {path.resolve().parent for path in state.rglob("*") if path.is_symlink()}
    temporary = sorted(str(path) for path in state.rglob(".*") if path not in linked)
    if temporary:
        run.fault(f"left behind in the state directory: {len(temporary)}, such as {temporary[:5]}")
    recorded = Counter(p.request_id for p in Records().predictions(NAME) if p.role == "served")
    run.counts["recorded"] = len(recorded)


def _check_no_process_left(run: Run, mark: str) -> None:
    """After `down`, no process of the cluster is left."""
    time.sleep(5)
    left = [_title(p) for p in psutil.process_iter() if _environment(p).get(session.MARK) == mark]
    if left:
        run.fault(f"processes left after down: {left[:10]}")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.pid != os.getpid() else {}
    except psutil.Error:
        return {}


# Growth


def _processes(run: Run) -> list[psutil.Process]:
    """The cluster's processes: the descendants of its head, and HAProxy, whose parent may be init by now."""
    mark = _environment(run.head).get(session.MARK)
    processes = {p.pid: p for p in run.head.children(recursive=True)}
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "haproxy" and _environment(process).get(session.MARK) == mark:
            processes[process.pid] = process
    return list(processes.values())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


class Growth:
    """Samples of the cluster's processes and of the state directory."""

    def __init__(self, run: Run):
        self._run = run
        self._memory: dict[tuple[str, int, float], list[tuple[float, float]]] = defaultdict(list)
        """Samples by process: seconds since the start, megabytes."""
        self._totals: dict[str, list[float]] = defaultdict(list)
        self._seconds = 0.0

    def watch(self, seconds: float) -> None:
        """Sample until the time is over."""
        started, self._seconds = time.monotonic(), seconds
        while (at := time.monotonic() - started) < seconds:
            self._sample(at)
            time.sleep(min(SAMPLE_S, seconds / 40))

    def _sample(self, at: float) -> None:
        totals: Counter[str] = Counter()
        for process in _processes(self._run):
            with contextlib.suppress(psutil.Error):
                kind = re.split(r"[:\s]", _title(process).removeprefix("ray::"))[0].rpartition("/")[2]
                title = _title(process)
                kind = ":".join(title.split(":")[2:5]) if "ServeReplica" in title else kind
                megabytes = process.memory_info().rss / 2**20
                self._memory[kind, process.pid, process.create_time()].append((at, megabytes))
                totals["memory_mb"] += round(megabytes)
                totals["processes"] += 1
                totals["threads"] += process.num_threads()
                totals["files"] += process.num_fds()
        for name, value in totals.items():
            self._totals[name].append(value)

    def _quarters(self, samples: list[tuple[float, float]]) -> tuple[float, float] | None:
        """Medians of the second and the last quarter; None for a process without samples in both."""
        second = [v for at, v in samples if 0.25 <= at / self._seconds < 0.5]
        last = [v for at, v in samples if at / self._seconds >= 0.75]
        return (statistics.median(second), statistics.median(last)) if second and last else None

    def figures(self) -> dict[str, Any]:
        """Medians of the second and the last quarter, of each total and of each process alive in both."""
        medians: dict[str, Any] = {}
        for name, values in self._totals.items():
            quarter = max(1, len(values) // 4)
            medians[name] = [
                statistics.median(values[quarter : 2 * quarter]),
                statistics.median(values[-quarter:]),
            ]
        for (kind, pid, _), samples in self._memory.items():
            if quarters := self._quarters(samples):
                medians[f"{kind} {pid}"] = [round(value, 1) for value in quarters]
        return medians

    def grown(self) -> list[str]:
        """The figures that grew by more than MAX_GROWTH and, for memory, MAX_GROWTH_MB, as text."""
        grown = []
        for name, (before, after) in self.figures().items():
            slack = max(
                MAX_GROWTH * before, 0 if name in ("processes", "threads", "files") else MAX_GROWTH_MB
            )
            if after - before > slack:
                grown.append(f"{name}: {before:g} -> {after:g}")
        return grown
