"""Proofs of what an endpoint promises under killed replicas, rollouts, overload and malformed requests.

    python benchmarks/soak.py [--only kills,rollouts,...] [--scale 1.0]

Each proof starts its own cluster and uses real processes and real HTTP. `--scale 0.1` makes each ten times
shorter; at scale 1, `everything` takes an hour. The last line is JSON; `holds` is true if the promises were
kept.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from everything import everything
from load import NotAnswered, Target, closed_loop, hammer, open_loop

from app.cluster.ports import free_ports
from app.cluster.session import session
from app.config import Serving
from app.errors import UserError
from app.registry import versions
from app.serving.control import deploy
from app.serving.control.undeploy import undeploy_all
from app.serving.gateway.bounds import DEFAULT_MAX_WAIT_S, MAX_CONCURRENT_REQUESTS
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.records import Records

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PROJECT = "configs/smoke.yaml"
NAME = "smoke"
BASE = f"/v2/models/{NAME}"
PLOT: Path | None = None
RETRY_S = 1.0
"""Wait of a client before its one retry, which follows any failure: a broken connection, 429, 503."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"comma-separated, from {', '.join(PROOFS)}")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--plot", type=Path, help="PNG file for the plot of load_step")
    arguments = parser.parse_args()
    global PLOT
    PLOT = arguments.plot
    names = arguments.only.split(",") if arguments.only else list(PROOFS)
    with tempfile.TemporaryDirectory(prefix="raylway-soak-") as home:
        os.environ["RAYLWAY_HOME"] = home
        train_versions()
        results = {}
        for name in names:
            results[name] = PROOFS[name](arguments.scale)
            print(f"{name}: {results[name]}", flush=True)
    print(json.dumps({"benchmark": "soak", "scale": arguments.scale, "proofs": results}))


def train_versions() -> None:
    """Train and register two versions."""
    for seed in (0, 1):
        subprocess.run(
            [BIN / "raylway", "train", PROJECT, "--set", f"seed={seed}", "--set", "gate.tolerance=1"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip


# The endpoint


@dataclass
class Served:
    """A running endpoint: deploys to it, and finds its processes."""

    serving: Serving
    url: str = ""
    head: psutil.Process = field(default_factory=psutil.Process)

    def replicas(self, application: str = NAME) -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{application}:" in " ".join(process.cmdline()):
                    processes.append(process)
        return processes

    def memory_mb(self) -> float:
        """Resident memory of the replicas and HAProxy."""
        proxies = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "haproxy"]
        resident_bytes = 0
        for process in self.replicas() + proxies:
            with contextlib.suppress(psutil.Error):
                resident_bytes += process.memory_info().rss
        return resident_bytes / 2**20

    def deploy(self, version: str = "1", **variants: Any) -> None:
        champion = {"version": version, "weight": 1}
        deployed = {}
        for name, settings in {"champion": champion, **variants}.items():
            path = versions.resolve(NAME, settings["version"]).path
            deployed[name] = DeployedVariant.model_validate({"path": path, **settings})
        traffic = Traffic(salt="soak", policy="weighted", variants=deployed)
        self.url = deploy.deploy(self.serving, NAME, traffic)


@contextlib.contextmanager
def served(replicas: int = 2, **settings: Any) -> Iterator[Served]:
    document = {
        "port": free_ports(1)[0],
        "num_cpus": 0.1,
        "variants": {"champion": {"version": "1", "weight": 1}},
        "autoscaling": {"min_replicas": replicas, "max_replicas": replicas},
        **settings,
    }
    with session(log_to_driver=False):
        endpoint = Served(Serving.model_validate(document))
        endpoint.deploy()
        try:
            yield endpoint
        finally:
            undeploy_all()


def rows() -> list[dict[str, Any]]:
    path = versions.resolve(NAME, "1").path / "example.json"
    return json.loads(path.read_text())["rows"]


def target(endpoint: Served) -> Target:
    bodies = [json.dumps({"rows": [row], "unit": f"u{n}"}).encode() for n, row in enumerate(rows() * 16)]
    return Target(f"{endpoint.url}{BASE}/predict", bodies)


class Clients:
    """Send requests at a constant rate, whether earlier ones are answered or not. Retry each failure once."""

    def __init__(self, endpoint: Served, per_s: float):
        self._endpoint = endpoint
        self._per_s = per_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.sent = 0
        self.failed: Counter[str] = Counter()
        """First tries without a 200, by status or type of error."""
        self.lost = 0
        """Number of requests whose retry failed too."""
        self.versions: Counter[str] = Counter()
        """Answers with 200, by version."""

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        async with httpx.AsyncClient(
            base_url=self._endpoint.url, trust_env=False, timeout=30, limits=limits
        ) as client:
            tasks, due, examples = set(), time.monotonic(), rows()
            while not self._ended.is_set():
                due += 1 / self._per_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.sent += 1
                body = {"rows": [examples[self.sent % len(examples)]], "unit": f"user-{self.sent % 100}"}
                task = asyncio.create_task(self._send(client, body))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _send(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        if await self._answered(client, body, self.failed):
            return
        await asyncio.sleep(RETRY_S)
        self.lost += not await self._answered(client, body, Counter())

    async def _answered(self, client: httpx.AsyncClient, body: Any, failed: Counter[str]) -> bool:
        try:
            response = await client.post(f"{BASE}/predict", json=body)
        except httpx.TransportError as error:
            failed[type(error).__name__] += 1
            return False
        if response.status_code != 200:
            failed[str(response.status_code)] += 1
            return False
        self.versions[response.json()["version"]] += 1
        return True

    def result(self) -> dict[str, Any]:
        num_failed = sum(self.failed.values())
        return {"asked": self.sent, "raw_loss": num_failed / max(1, self.sent), "lost": self.lost} | {
            "failed": dict(self.failed)
        }


# The proofs


def kills(scale: float) -> dict[str, Any]:
    """One of three replicas, chosen at random, is killed every 5 s for 120 s, at 50 requests/s."""
    rng = random.Random(0)
    with served(replicas=3) as endpoint, Clients(endpoint, 50) as clients:
        killed, end = 0, time.monotonic() + max(12, 120 * scale)
        while time.monotonic() < end:
            time.sleep(5)
            if running := endpoint.replicas():
                rng.choice(running).kill()
                killed += 1
    result = clients.result()
    return {**result, "killed": killed, "holds": result["raw_loss"] <= 0.001 and result["lost"] == 0}


def rollouts(scale: float) -> dict[str, Any]:
    """Ten rolling updates at 50 requests/s, every other one with new replicas; then a broken bundle."""
    with served() as endpoint, Clients(endpoint, 50) as clients:
        for number in range(max(2, round(10 * scale))):
            if number % 2:
                limits = endpoint.serving.limits.model_copy(update={"max_rows": 1000 + number})
                endpoint.serving = endpoint.serving.model_copy(update={"limits": limits})
            endpoint.deploy(str(1 + number % 2))
            time.sleep(1)
        refused = _refuses_broken_bundle(endpoint)
    result = clients.result()
    holds = not result["failed"] and set(clients.versions) == {"1", "2"} and refused
    return {**result, "versions": dict(clients.versions), "broken_refused": refused, "holds": holds}


def _refuses_broken_bundle(endpoint: Served) -> bool:
    good = versions.resolve(NAME, "1").path
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "bundle"
        subprocess.run(["cp", "-r", good, broken], check=True)
        (broken / "model.onnx").write_bytes(b"broken")
        variants = {"champion": DeployedVariant(version="9", weight=1, path=broken)}
        try:
            deploy.deploy(endpoint.serving, NAME, Traffic(salt="s", policy="weighted", variants=variants))
        except UserError:
            return True
    return False


def overload(scale: float) -> dict[str, Any]:
    """Ten times as many clients as a replica admits at once, against exactly as many. Excess requests wait
    for at most DEFAULT_MAX_WAIT_S and then get 429."""
    seconds = max(4, 20 * scale)
    with served(replicas=1) as endpoint:
        predict = target(endpoint)
        closed_loop(predict, seconds=2)
        before_mb = endpoint.memory_mb()
        full = asyncio.run(hammer(predict, connections=MAX_CONCURRENT_REQUESTS, seconds=seconds))
        overloaded = asyncio.run(hammer(predict, connections=10 * MAX_CONCURRENT_REQUESTS, seconds=seconds))
        after_mb = endpoint.memory_mb()
    return {
        "requests_per_s": round(full.answered_per_s),
        "admitted_per_s": round(overloaded.answered_per_s),
        "statuses": dict(overloaded.statuses),
        "p99_ms": [round(full.p99_s * 1e3, 1), round(overloaded.p99_s * 1e3, 1)],
        "memory_growth_mb": round(after_mb - before_mb, 1),
        "holds": set(overloaded.statuses) <= {200, 429}
        and overloaded.p99_s <= DEFAULT_MAX_WAIT_S + 2 * full.p99_s
        and after_mb - before_mb < 50,
    }


def half_load(scale: float) -> dict[str, Any]:
    """Ten minutes of Poisson arrivals at half of a replica's closed-loop rate: every request gets 2xx."""
    seconds = 600 * scale
    with served(replicas=1) as endpoint:
        predict = target(endpoint)
        per_s = closed_loop(predict, seconds=max(4, 10 * scale)).requests_per_s / 2
        load = {"per_s": round(per_s), "requests": round(per_s * seconds)}
        try:
            latency = open_loop(predict, per_s=per_s, seconds=seconds)
        except NotAnswered as error:
            return {**load, "refused": str(error), "holds": False}
    return {**load, "p50_ms": latency.p50_s * 1e3, "p99_ms": latency.p99_s * 1e3, "holds": True}


def malformed(scale: float) -> dict[str, Any]:
    """10,000 malformed requests: half generated from the endpoint's OpenAPI document, half raw bytes."""
    num_requests = max(600, round(10_000 * scale))
    with served(replicas=1) as endpoint:
        closed_loop(target(endpoint), seconds=2)
        before_mb = endpoint.memory_mb()
        statuses: Counter[str] = Counter()
        _send_by_schema(endpoint, num_requests // 2, statuses)
        _send_raw(endpoint, num_requests - statuses.total(), statuses)
        after_mb = endpoint.memory_mb()
        response = httpx.post(f"{endpoint.url}{BASE}/predict", json={"rows": rows()[:1]}, trust_env=False)
    still_answers = response.status_code == 200
    return {
        "requests": statuses.total(),
        "statuses": dict(statuses),
        "memory_growth_mb": round(after_mb - before_mb, 1),
        "holds": still_answers and not any(s.startswith("5") for s in statuses) and after_mb - before_mb < 50,
    }


def _send_by_schema(endpoint: Served, count: int, statuses: Counter[str]) -> None:
    """Send invalid requests that schemathesis generates from the OpenAPI document."""
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    document = httpx.get(f"{endpoint.url}{BASE}/openapi.json", trust_env=False).json()
    schema = schemathesis.openapi.from_dict(document)
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30) as client:
        for operation in (result.ok() for result in schema.get_all_operations()):
            strategy = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

            @hypothesis.settings(
                max_examples=count // 3, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
            )  # fmt: skip
            @hypothesis.given(case=strategy)
            def send(case: Any) -> None:
                arguments = case.as_transport_kwargs(base_url=endpoint.url)
                request = {
                    key: arguments[key]
                    for key in ("method", "url", "headers", "json", "data", "params")
                    if key in arguments
                }
                try:
                    response = client.request(**request)
                except (httpx.InvalidURL, UnicodeEncodeError, ValueError, TypeError):
                    statuses["not sent"] += 1
                    return
                statuses[str(response.status_code)] += 1

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                send()


def _send_raw(endpoint: Served, count: int, statuses: Counter[str]) -> None:
    """Send random combinations of broken request lines, headers, bodies and lengths."""
    rng = random.Random(0)
    row = json.dumps(rows()[0])
    good = f'{{"rows": [{row}]}}'.encode()
    name = next(k for k, v in rows()[0].items() if isinstance(v, (int, float))).encode()
    bodies = [
        b"", b"\xff\xfe", b"{", b"null", b"[]", b"{}", b'{"rows": []}', b"[" * 100_000, b'{"a":' * 20_000,
        good[:-2], good + b"x", good.replace(b"{", b"{\x00"), b'{"rows": [{"' + name + b'": NaN}]}',
        b'{"rows": [{"' + name + b'": 1e999}]}', b'{"rows": [{"' + name + b'": -Infinity}]}',
        b'{"rows": [{"' + name + b'": "\\ud800"}]}', b'{"rows": [{"\\udfff": 1}]}', b'{"rows": 1e400}',
        b'{"rows": [' + b"1," * 50_000 + b"1]}", b'{"unit": "' + b"x" * 300_000 + b'"}',
        b'{"rows": [{"' + name + b'": ' + b"9" * 5_000 + b"}]}",
    ]  # fmt: skip
    heads = [
        b"content-type: application/json", b"content-type: \xff", b"content-type: text/html",
        b"x: " + b"y" * 9_000,
        b"x-request-id: \xff\xfe", b"x-request-id: a b c", b"x-request-timeout-seconds: 0",
        b"x-session-id: \x80",
        b"serve_multiplexed_model_id: \xc3\x28", b"authorization: Bearer \xff", b"traceparent: \xff",
        b"content-encoding: gzip", b"expect: 100-continue", b"te: trailers",
        b"inference-header-content-length: -1", b"inference-header-content-length: 999999",
        b"transfer-encoding: chunked", b": nothing", b"no colon",
        b"x-raylway-unit: " + b"u" * 400, b"x-raylway-variant: \xe2\x28\xa1",
    ]  # fmt: skip
    lines = [
        b"POST %s/predict HTTP/1.1", b"POST %s/infer HTTP/1.1", b"POST %s/feedback HTTP/1.1",
        b"POST %s/explain HTTP/1.1", b"PUT %s/predict HTTP/1.1", b"GET %s/versions/\xff HTTP/1.1",
        b"POST %s/versions/%%00/predict HTTP/1.1", b"GET %s/../../.. HTTP/1.1", b"POST %s/predict HTTP/9.9",
        b"POST %s/predict", b"\x00\x01\x02 %s", b"BREW %s HTTP/1.1", b"GET /%%ff%%fe%s HTTP/1.1",
    ]  # fmt: skip
    host, port = endpoint.url.removeprefix("http://").split(":")
    for number in range(count):
        line = rng.choice(lines) % BASE.encode()
        if number % 500 == 7:  # 50 MB in chunks
            statuses[_send(host, int(port), _chunked(line))] += 1
            continue
        body = rng.choice(bodies)
        length = len(body) if rng.random() < 0.8 else rng.choice([0, 1, 10**12, -1, 10**30])
        head = [line, b"Host: x", b"Connection: close", rng.choice(heads), b"Content-Length: %d" % length]
        if rng.random() < 0.7:
            head.insert(3, b"content-type: application/json")
        statuses[_send(host, int(port), [b"\r\n".join(head) + b"\r\n\r\n" + body])] += 1


def _chunked(line: bytes) -> Iterator[bytes]:
    yield line + b"\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(50):
        yield b"100000\r\n" + b" " * 2**20 + b"\r\n"
    yield b"0\r\n\r\n"


def _send(host: str, port: int, parts: Any) -> str:
    """Send the bytes: the status of the answer, or `closed` if the connection ends without one."""
    answer = b""
    with socket.create_connection((host, port), timeout=20) as connection:
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            answer = connection.recv(64)
    return answer.split(b" ")[1].decode("latin-1") if answer.startswith(b"HTTP/") else "closed"


def feedback(scale: float) -> dict[str, Any]:
    """Replicas are killed at 200 random points. Acknowledged feedback is neither lost nor stored twice."""
    rng, acknowledged, ended = random.Random(0), [], threading.Event()

    def send_feedback(part: int) -> None:
        number = 0
        with httpx.Client(trust_env=False, timeout=30) as client:
            while not ended.is_set():
                number += 1
                body = {"request_id": f"f-{part}-{number}", "reward": (number % 11) / 10}
                with contextlib.suppress(httpx.TransportError):
                    response = client.post(f"{endpoint.url}{BASE}/feedback", json=body)
                    if response.status_code == 202:  # no prediction has this id: quarantined, but durable
                        acknowledged.append((body["request_id"], body["reward"]))

    with served(replicas=3, limits={"feedback_per_hour": 10**9}) as endpoint:
        threads = [threading.Thread(target=send_feedback, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        killed = acknowledged_at_kill = 0
        while killed < max(6, round(200 * scale)):
            if len(acknowledged) < acknowledged_at_kill + 8:
                time.sleep(0.05)  # wait until a replica answers again
                continue
            time.sleep(rng.uniform(0, 0.5))
            acknowledged_at_kill = len(acknowledged)
            rng.choice(endpoint.replicas()).kill()
            killed += 1
        ended.set()
        for thread in threads:
            thread.join()
        stored = Counter(
            (f.request_id, f.content["reward"]) for f in Records().feedback(NAME, quarantined=True)
        )
    lost = sum(key not in stored for key in acknowledged)
    doubled = sum(count > 1 for count in Counter(key for key, _ in stored.elements()).values())
    counts = {"killed": killed, "acknowledged": len(acknowledged), "lost": lost, "doubled": doubled}
    return {**counts, "holds": bool(acknowledged) and not lost and not doubled}


def shadow(scale: float) -> dict[str, Any]:
    """A shadow that hangs changes no answer and adds at most 5 % to the p99 latency."""
    rounds, seconds = max(2, round(10 * scale)), max(3, 15 * scale)
    p99: dict[bool, list[float]] = {True: [], False: []}
    with served(replicas=1) as endpoint:
        body = {"rows": rows(), "unit": "user-1"}
        answers = set()
        for hanging in (False, True) * rounds:
            application = f"{NAME}@2"
            shadow_variant = {"dark": {"version": "2", "weight": 0, "shadow": True, "workers": application}}
            endpoint.deploy("1", **(shadow_variant if hanging else {}))
            for process in endpoint.replicas(application):
                process.suspend()
            headers = {"x-request-id": "the-same"}
            answer = httpx.post(f"{endpoint.url}{BASE}/predict", json=body, headers=headers, trust_env=False)
            answers.add(answer.content)
            open_loop(target(endpoint), per_s=200, seconds=1)
            p99[hanging].append(open_loop(target(endpoint), per_s=200, seconds=seconds).p99_s)
            for process in endpoint.replicas(application):
                process.kill()
    ratio = statistics.median(p99[True]) / statistics.median(p99[False])
    by_round = sorted(a / b for a, b in zip(p99[True], p99[False], strict=True))
    figures = {"p99_ratio": round(ratio, 3), "low": round(by_round[0], 3), "high": round(by_round[-1], 3)}
    return {**figures, "answers": len(answers), "holds": len(answers) == 1 and ratio <= 1.05}


@dataclass
class LoadStep:
    """Samples taken while the load rises in one step; `seconds` counts from the step."""

    seconds: list[float] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    second_s: float = float("inf")
    """Seconds from the step to the second replica's first answer."""


def load_step(scale: float) -> dict[str, Any]:
    """Seconds from an overload of one replica until a second one answers, against Serve's defaults."""
    calm_s, seconds = max(5.0, 10 * scale), max(30.0, 90 * scale)
    # Many rows per request, so that the replica is the bottleneck and not the clients.
    bodies = [json.dumps({"rows": rows() * 32}).encode()]
    autoscaling = {"min_replicas": 1, "max_replicas": 2}
    with served(autoscaling=autoscaling) as endpoint:
        predict = Target(f"{endpoint.url}{BASE}/predict", bodies)
        with _handle() as handle:
            ours = _step(predict, lambda _: _num_answering(handle), calm_s, seconds)
    (port,) = free_ports(1)
    with _serve_defaults(port):
        seen: set[int] = set()

        def num_pids(answers: list[bytes]) -> int:
            seen.update(json.loads(answer)["replica"] for answer in answers)
            return len(seen)

        theirs = _step(Target(f"http://127.0.0.1:{port}/predict", bodies), num_pids, calm_s, seconds)
    if PLOT:
        _plot(ours, theirs)
    ratio = ours.second_s / theirs.second_s
    return {
        "second_replica_s": [round(ours.second_s, 1), round(theirs.second_s, 1)],
        "ratio": round(ratio, 3),
        "holds": ratio <= 0.15,
    }


@contextlib.contextmanager
def _handle() -> Iterator[Any]:
    """A handle to the endpoint's replicas."""
    from ray.serve.handle import DeploymentHandle

    handle: Any = DeploymentHandle(NAME, NAME)
    handle._init(_run_router_in_separate_loop=True)
    try:
        yield handle
    finally:
        handle.shutdown()


def _num_answering(handle: Any) -> int:
    """Number of Raylway's replicas that have answered a request in the last minute."""
    return sum(bool(state.recent) for state in handle.broadcast("state").results())


def _step(
    target: Target, num_replicas: Callable[[list[bytes]], int], calm_s: float, seconds: float
) -> LoadStep:
    """One client from the start, 24 more at once after `calm_s`. `num_replicas` counts those that answer."""
    step, ended = LoadStep(), threading.Event()
    answers: list[tuple[float, float, bytes]] = []
    started = time.monotonic()

    def client(delay: float) -> None:
        time.sleep(delay)
        with httpx.Client(trust_env=False, timeout=60) as http:
            headers, number = {"content-type": "application/json"}, 0
            while not ended.is_set():
                number += 1
                sent = time.monotonic()
                body = target.bodies[number % len(target.bodies)]
                response = http.post(target.url, content=body, headers=headers)
                if response.status_code == 200:
                    answers.append((time.monotonic(), time.monotonic() - sent, response.content))
                else:
                    time.sleep(0.1)
                time.sleep(0.05 if not delay else 0)

    threads = [threading.Thread(target=client, args=(0.0 if not n else calm_s,)) for n in range(25)]
    for thread in threads:
        thread.start()
    while (now := time.monotonic()) < started + calm_s + seconds:
        time.sleep(0.5)
        since_step = now - started - calm_s
        recent = [(latency, content) for at, latency, content in answers[-20_000:] if at > now - 1]
        count = num_replicas([content for _, content in recent])
        step.seconds.append(since_step)
        step.replicas.append(count)
        step.per_s.append(len(recent))
        latencies = sorted(latency for latency, _ in recent)
        step.p99_ms.append(1e3 * latencies[int(0.99 * (len(latencies) - 1))] if latencies else float("nan"))
        if count > 1 and step.second_s == float("inf"):
            step.second_s = since_step
        if count > 1 and since_step > step.second_s + 10:
            break
    ended.set()
    for thread in threads:
        thread.join()
    return step


@contextlib.contextmanager
def _serve_defaults(port: int) -> Iterator[None]:
    bundle = versions.resolve(NAME, "1").path
    environment = {**os.environ, "BUNDLE": str(bundle)}
    program = ROOT / "benchmarks" / "serve_peers" / "serve_defaults.py"
    server = subprocess.Popen(
        [sys.executable, program, str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                url = f"http://127.0.0.1:{port}/predict"
                if httpx.post(url, json={"rows": rows()}, trust_env=False).status_code == 200:
                    break
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait(timeout=60)


def _plot(ours: LoadStep, theirs: LoadStep) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True)
    for label, step in (("Raylway", ours), ("Serve's defaults", theirs)):
        axes[0].plot(step.seconds, step.per_s, label=label)
        axes[1].step(step.seconds, step.replicas, where="post", label=label)
        axes[2].plot(step.seconds, step.p99_ms, label=label)
    for axis, name in zip(axes, ("answers per second", "replicas that answer", "p99, ms"), strict=True):
        axis.set_ylabel(name)
        axis.axvline(0, color="grey", linestyle=":")
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[0].legend()
    axes[2].set_xlabel("seconds after the load step")
    figure.suptitle("24 clients start at once")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


PROOFS: dict[str, Callable[[float], dict[str, Any]]] = {
    proof.__name__: proof
    for proof in (kills, rollouts, overload, half_load, malformed, feedback, shadow, load_step, everything)
}

if __name__ == "__main__":
    main()
