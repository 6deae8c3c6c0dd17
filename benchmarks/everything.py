"""An hour of everything at once, on one cluster, by way of the commands and HTTP alone.

Clients predict and give feedback while replicas and HAProxy are killed, slow and malformed requests arrive,
load bursts to ten times, and operators train, promote, shift traffic, sign, compress, predict and deploy.
Promised: no request is lost after one retry, or after a kill of HAProxy once another listens; commands end as
documented; and nothing grows.

Growth is judged on processes that live through the last three quarters of the time: the median of the last
quarter against the median of the second. The first quarter is warm-up.
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
AWAY_S = 20.0
"""How long nobody may listen after a kill of HAProxy."""
REQUESTS_PER_S = 20
BURST_CONNECTIONS = 640
SAMPLE_S = 10.0
MAX_GROWTH = 0.10
"""Largest growth of a process's memory, or of a count, that is not called growth."""
MAX_GROWTH_MB = 30.0
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Run:
    """What the actors share, and what they found."""

    url: str
    token: str
    head: psutil.Process
    settings: list[str]
    folder: Path
    services: Path
    """Where Ray writes for Prometheus what to read."""
    ended: threading.Event = field(default_factory=threading.Event)
    bursting: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    away_s: float = 0.0
    """Longest time until a client whose connection failed was answered."""
    front_killed_s: float = float("-inf")
    """When HAProxy was killed last, by the monotonic clock."""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def fault(self, text: str) -> None:
        print(f"  FAULT: {text}", file=sys.stderr, flush=True)
        self.faults.append(text)


def everything(scale: float) -> dict[str, Any]:
    """All actors at once for an hour times `scale`."""
    with tempfile.TemporaryDirectory(prefix="raylway-everything-") as folder:
        run = _start(Path(folder))
        mark = _environment(run.head)[session.MARK]
        try:
            actors = [threading.Thread(target=_repeated, args=(run, actor, s)) for actor, s in ACTORS.items()]
            growth = Growth(run)
            for thread in actors:
                thread.start()
            growth.watch(HOUR_S * scale)
            run.ended.set()
            for thread in actors:
                thread.join()
            try:
                _check_state(run)
            except Exception as error:  # what was found in the hour is said in any case
                run.fault(f"the state afterwards: {type(error).__name__}: {str(error)[-800:]}")
        finally:
            run.ended.set()
            _raylway("down")
        _check_remains(run, mark)
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
    """A cluster with a served champion and challenger."""
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
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    if done.returncode not in allowed or TRACEBACK in done.stdout + done.stderr:
        end = (done.stdout + done.stderr).strip()[-600:]
        raise RuntimeError(f"`raylway {' '.join(arguments)}` ended with {done.returncode}: {end}")
    return done


def _repeated(run: Run, actor: Callable[[Run, random.Random], None], pause_s: float) -> None:
    chance = random.Random(actor.__name__)
    while not run.ended.wait(pause_s * chance.uniform(0.5, 1.5)):
        try:
            actor(run, chance)
        except Exception as error:
            run.fault(f"{actor.__name__}: {type(error).__name__}: {str(error)[-800:]}")


# The actors: each is called again and again, with a pause between.


def clients(run: Run, chance: random.Random) -> None:
    """Ten seconds of requests at a constant rate, a quarter of them followed by feedback."""
    asyncio.run(_clients(run, chance, 10.0))


async def _clients(run: Run, chance: random.Random, seconds: float) -> None:
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(
        base_url=run.url, headers=run.headers, trust_env=False, timeout=30, limits=limits
    ) as client:
        tasks = []
        for _ in range(round(seconds * REQUESTS_PER_S)):
            tasks.append(asyncio.create_task(_ask(run, client, chance.random(), chance.randrange(10**12))))
            await asyncio.sleep(1 / REQUESTS_PER_S)
        await asyncio.gather(*tasks)


async def _ask(run: Run, client: httpx.AsyncClient, draw: float, number: int) -> None:
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
    """Whether the request was answered with 2xx, on the first try or the second; while HAProxy is being
    replaced, on a later one."""
    burst, begun, tries, failed = run.bursting.is_set(), time.monotonic(), 0, False
    while tries < 2 or time.monotonic() - run.front_killed_s < AWAY_S:
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
                    run.away_s = max(run.away_s, time.monotonic() - begun)
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


def stalls(run: Run, chance: random.Random) -> None:
    """Strangers without a token that open connections, send part of a request, and fall silent."""
    host, port = run.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as opened:
        for _ in range(40):
            try:
                connection = opened.enter_context(contextlib.closing(_connect(host, int(port))))
            except ConnectionRefusedError:
                return  # HAProxy is being replaced
            head = f"POST {BASE}/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            part = head + f"content-length: 900000\r\n\r\n{'x' * chance.randrange(40_000)}"
            with contextlib.suppress(OSError):
                connection.sendall(part[: chance.randrange(20, len(part))].encode())
        run.counts["stalled connections"] += 40
        run.ended.wait(20)


def _connect(host: str, port: int) -> Any:
    import socket

    return socket.create_connection((host, port), timeout=10)


def malformed(run: Run, chance: random.Random) -> None:
    """A request that nobody should send: it gets a 4xx, or the connection is closed."""
    bodies = [
        b"", b"\xff\xfe", b"null", b"[" * 50_000, b'{"rows": []}', b'{"rows": [{"age": 1e999}]}',
        b'{"rows": [{"gender": "\\ud800"}]}', b'{"unit": "' + b"x" * 200_000 + b'"}', b"0" * 2_000_000,
    ]  # fmt: skip
    action = chance.choice(["/predict", "/infer", "/feedback", "/explain", "/nothing"])
    headers = {**run.headers, "content-type": "application/json"}
    if chance.random() < 0.3:
        headers["authorization"] = chance.choice(["", "Bearer x", "Bearer " + "a.b.c" * 500])
    try:
        response = httpx.post(
            run.url + BASE + action,
            content=chance.choice(bodies),
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


def bursts(run: Run, chance: random.Random) -> None:
    """Ten times overload for ten seconds: only 200 and 429."""
    bodies = [json.dumps({"rows": [_row(n)]}).encode() for n in range(64)]
    target = Target(run.url + BASE + "/predict", bodies, tuple(run.headers.items()))
    run.bursting.set()
    try:
        found = asyncio.run(hammer(target, connections=BURST_CONNECTIONS, seconds=10))
        for status, count in found.statuses.items():
            run.counts[f"burst: {status}"] += count
    except (OSError, asyncio.IncompleteReadError) as error:
        run.counts[f"burst: {type(error).__name__}"] += 1  # a process was killed meanwhile
    finally:
        time.sleep(2 * RETRY_S)
        run.bursting.clear()


def kills(run: Run, chance: random.Random) -> None:
    """A replica, or now and then HAProxy."""
    kind = "haproxy" if chance.random() < 0.1 else f"ServeReplica:{NAME}:"
    found = [p for p in _processes(run) if kind in _title(p)]
    if found:
        with contextlib.suppress(psutil.Error):
            if kind == "haproxy":
                run.front_killed_s = time.monotonic()
            chance.choice(found).kill()
            run.counts[f"killed {kind}"] += 1


def scrapes(run: Run, chance: random.Random) -> None:
    """Prometheus, as it finds what to read. Ray's agent forgets what dead workers told when it is read."""
    for service in json.loads(run.services.read_text()):
        for target in service["targets"]:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://{target}/metrics", trust_env=False, timeout=30).raise_for_status()
                run.counts["scrapes"] += 1


def operators(run: Run, chance: random.Random) -> None:
    """A command, as a person gives it; 2 is the answer to what cannot be done now, 3 that of the gate."""
    command = chance.choice(list(COMMANDS))
    arguments, allowed = COMMANDS[command](run, chance)
    done = _raylway(command, *arguments, allowed=allowed)
    run.counts[f"raylway {command}: {done.returncode}"] += 1


def _train(run: Run, chance: random.Random) -> tuple[list[str], tuple[int, ...]]:
    seed = f"seed={chance.randrange(20)}"
    return [PROJECT, *run.settings, "--set", seed], (0, 3)


def _compress(run: Run, chance: random.Random) -> tuple[list[str], tuple[int, ...]]:
    return [str(versions.resolve(NAME, "champion").path), "--register"], (0, 2)


def _sweep(run: Run, chance: random.Random) -> tuple[list[str], tuple[int, ...]]:
    study = f"sweep.study=soak-{chance.randrange(10**9)}"
    return [PROJECT, *run.settings, "--trials", "2", "--set", study], (0,)


def _predict(run: Run, chance: random.Random) -> tuple[list[str], tuple[int, ...]]:
    table = run.folder / "rows.parquet"
    if not table.exists():
        import pandas as pd

        pd.DataFrame([_row(n) for n in range(2_000)]).to_parquet(table)
    output = str(run.folder / f"predicted-{chance.randrange(10**9)}")
    return [f"{NAME}@champion", "--input", str(table), "--output", output], (0,)


COMMANDS: dict[str, Callable[[Run, random.Random], tuple[list[str], tuple[int, ...]]]] = {
    "train": _train,
    "serve": lambda run, chance: ([PROJECT, *run.settings], (0,)),
    "traffic": lambda run, chance: ([NAME, "--champion", str(chance.randrange(1, 100))], (0,)),
    "promote": lambda run, chance: ([NAME, "challenger"], (0, 2)),
    "compress": _compress,
    "predict": _predict,
    "sweep": _sweep,
    "sign": lambda run, chance: ([f"{NAME}@champion"], (0,)),
    "token": lambda run, chance: (["somebody"], (0,)),
    "status": lambda run, chance: (["--json"], (0,)),
    "audit": lambda run, chance: ([], (0,)),
    "versions": lambda run, chance: ([NAME], (0,)),
}

ACTORS: dict[Callable[[Run, random.Random], None], float] = {
    clients: 0.1, stalls: 30.0, malformed: 0.5, bursts: 240.0, kills: 30.0, scrapes: 15.0, operators: 5.0,
}  # fmt: skip
"""With the mean pause between two calls, in seconds."""


# What must hold at the end


def _check_state(run: Run) -> None:
    """The log is whole, every version verifies, nothing half-made is left."""
    _raylway("audit")
    for version in versions.versions(NAME):
        verify(versions.resolve(NAME, str(version.version)).path)
    state = Path(os.environ["RAYLWAY_HOME"])
    linked = {path.resolve().parent for path in state.rglob("*") if path.is_symlink()}
    drafts = sorted(str(path) for path in state.rglob(".*") if path not in linked)
    if drafts:
        run.fault(f"left behind in the state directory: {len(drafts)}, such as {drafts[:5]}")
    counted = Counter(p.request_id for p in Records().predictions(NAME) if p.role == "served")
    run.counts["recorded"] = len(counted)


def _check_remains(run: Run, mark: str) -> None:
    """After `down`, no process and no folder of the cluster is left."""
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
    """The cluster's: those below its head, and HAProxy, which may have been taken over by init."""
    mark = _environment(run.head).get(session.MARK)
    found = {p.pid: p for p in run.head.children(recursive=True)}
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "haproxy" and _environment(process).get(session.MARK) == mark:
            found[process.pid] = process
    return list(found.values())


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
        """By process: seconds since the start, megabytes."""
        self._totals: dict[str, list[float]] = defaultdict(list)
        self._seconds = 0.0

    def watch(self, seconds: float) -> None:
        """Sample until the time is over."""
        begun, self._seconds = time.monotonic(), seconds
        while (at := time.monotonic() - begun) < seconds:
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
        """Medians of the second and the last quarter; None for a process that was not there in both."""
        second = [v for at, v in samples if 0.25 <= at / self._seconds < 0.5]
        last = [v for at, v in samples if at / self._seconds >= 0.75]
        return (statistics.median(second), statistics.median(last)) if second and last else None

    def figures(self) -> dict[str, Any]:
        """Of each total and of each process that lived through: second quarter, last quarter."""
        found: dict[str, Any] = {}
        for name, values in self._totals.items():
            quarter = max(1, len(values) // 4)
            found[name] = [
                statistics.median(values[quarter : 2 * quarter]),
                statistics.median(values[-quarter:]),
            ]
        for (kind, pid, _), samples in self._memory.items():
            if quarters := self._quarters(samples):
                found[f"{kind} {pid}"] = [round(value, 1) for value in quarters]
        return found

    def grown(self) -> list[str]:
        """What grew by more than MAX_GROWTH and MAX_GROWTH_MB."""
        found = []
        for name, (before, after) in self.figures().items():
            slack = max(
                MAX_GROWTH * before, 0 if name in ("processes", "threads", "files") else MAX_GROWTH_MB
            )
            if after - before > slack:
                found.append(f"{name}: {before:g} -> {after:g}")
        return found
