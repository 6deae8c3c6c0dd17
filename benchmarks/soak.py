"""What an endpoint does when things go wrong: killed replicas, rollouts, overload, malformed requests.

    python benchmarks/soak.py [--only kills,rollouts,...] [--scale 1.0]

Each proof has a cluster of its own, real processes and real HTTP. `--scale 0.1` makes all of them ten times
as short; `everything` takes an hour. The last line is JSON; `holds` says whether the promises were kept.
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
"""What a client waits before its one retry: on a broken connection, 429 and 503, as the README says."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"of {', '.join(PROOFS)}")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--plot", type=Path, help="where the plot of the load step goes (PNG)")
    arguments = parser.parse_args()
    global PLOT
    PLOT = arguments.plot
    names = arguments.only.split(",") if arguments.only else list(PROOFS)
    with tempfile.TemporaryDirectory(prefix="raylway-soak-") as home:
        os.environ["RAYLWAY_HOME"] = home
        train_versions()
        found = {}
        for name in names:
            found[name] = PROOFS[name](arguments.scale)
            print(f"{name}: {found[name]}", flush=True)
    print(json.dumps({"benchmark": "soak", "scale": arguments.scale, "proofs": found}))


def train_versions() -> None:
    """Two registered ones."""
    for seed in (0, 1):
        subprocess.run(
            [BIN / "raylway", "train", PROJECT, "--set", f"seed={seed}", "--set", "gate.tolerance=1"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip


# The endpoint


@dataclass
class Served:
    """An endpoint with what is done to it."""

    serving: Serving
    url: str = ""
    head: psutil.Process = field(default_factory=psutil.Process)

    def replicas(self, application: str = NAME) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{application}:" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def memory_mb(self) -> float:
        """Of the replicas and HAProxy."""
        proxies = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "haproxy"]
        used = 0
        for process in self.replicas() + proxies:
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        return used / 2**20

    def deploy(self, version: str = "1", **variants: Any) -> None:
        champion = {"version": version, "weight": 1}
        found = {}
        for name, settings in {"champion": champion, **variants}.items():
            path = versions.resolve(NAME, settings["version"]).path
            found[name] = DeployedVariant.model_validate({"path": path, **settings})
        wanted = Traffic(salt="soak", policy="weighted", variants=found)
        self.url = deploy.deploy(self.serving, NAME, wanted)


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
    """Requests at a constant rate, whether earlier ones are answered or not; each with one retry."""

    def __init__(self, endpoint: Served, per_s: float):
        self._endpoint = endpoint
        self._per_s = per_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.asked = 0
        self.failed: Counter[str] = Counter()
        """What first tries got that was no 200."""
        self.lost = 0
        """Requests that their retry did not help."""
        self.versions: Counter[str] = Counter()

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
            tasks, due, questions = set(), time.monotonic(), rows()
            while not self._ended.is_set():
                due += 1 / self._per_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.asked += 1
                body = {"rows": [questions[self.asked % len(questions)]], "unit": f"user-{self.asked % 100}"}
                task = asyncio.create_task(self._ask(client, body))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
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
        raw = sum(self.failed.values())
        return {"asked": self.asked, "raw_loss": raw / max(1, self.asked), "lost": self.lost} | {
            "failed": dict(self.failed)
        }


# The proofs


def kills(scale: float) -> dict[str, Any]:
    """A random replica of three is killed every 5 s for 120 s, at 50 requests/s."""
    chance = random.Random(0)
    with served(replicas=3) as endpoint, Clients(endpoint, 50) as clients:
        killed, end = 0, time.monotonic() + max(12, 120 * scale)
        while time.monotonic() < end:
            time.sleep(5)
            if running := endpoint.replicas():
                chance.choice(running).kill()
                killed += 1
    result = clients.result()
    return {**result, "killed": killed, "holds": result["raw_loss"] <= 0.001 and result["lost"] == 0}


def rollouts(scale: float) -> dict[str, Any]:
    """Ten rolling updates at 50 requests/s, every other one with new replicas; and one that cannot be."""
    with served() as endpoint, Clients(endpoint, 50) as clients:
        for number in range(max(2, round(10 * scale))):
            if number % 2:
                limits = endpoint.serving.limits.model_copy(update={"max_rows": 1000 + number})
                endpoint.serving = endpoint.serving.model_copy(update={"limits": limits})
            endpoint.deploy(str(1 + number % 2))
            time.sleep(1)
        refused = _refused(endpoint)
    result = clients.result()
    kept = not result["failed"] and set(clients.versions) == {"1", "2"} and refused
    return {**result, "versions": dict(clients.versions), "broken_refused": refused, "holds": kept}


def _refused(endpoint: Served) -> bool:
    """Whether a broken bundle is refused."""
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
    """Ten times as many clients as a replica has places, against just as many: they wait for at most
    DEFAULT_MAX_WAIT_S, and then get 429."""
    seconds = max(4, 20 * scale)
    with served(replicas=1) as endpoint:
        asked = target(endpoint)
        closed_loop(asked, seconds=2)
        before = endpoint.memory_mb()
        usual = asyncio.run(hammer(asked, connections=MAX_CONCURRENT_REQUESTS, seconds=seconds))
        much = asyncio.run(hammer(asked, connections=10 * MAX_CONCURRENT_REQUESTS, seconds=seconds))
        after = endpoint.memory_mb()
    return {
        "requests_per_s": round(usual.answered_per_s),
        "admitted_per_s": round(much.answered_per_s),
        "statuses": dict(much.statuses),
        "p99_ms": [round(usual.p99_s * 1e3, 1), round(much.p99_s * 1e3, 1)],
        "memory_growth_mb": round(after - before, 1),
        "holds": set(much.statuses) <= {200, 429}
        and much.p99_s <= DEFAULT_MAX_WAIT_S + 2 * usual.p99_s
        and after - before < 50,
    }


def half_load(scale: float) -> dict[str, Any]:
    """Ten minutes of Poisson arrivals at half of what a replica answers: nobody is refused."""
    seconds = 600 * scale
    with served(replicas=1) as endpoint:
        asked = target(endpoint)
        per_s = closed_loop(asked, seconds=max(4, 10 * scale)).requests_per_s / 2
        found = {"per_s": round(per_s), "requests": round(per_s * seconds)}
        try:
            given = open_loop(asked, per_s=per_s, seconds=seconds)
        except NotAnswered as error:
            return {**found, "refused": str(error), "holds": False}
    return {**found, "p50_ms": given.p50_s * 1e3, "p99_ms": given.p99_s * 1e3, "holds": True}


def malformed(scale: float) -> dict[str, Any]:
    """10,000 requests that nobody should send: by the endpoint's own description, and bytes as they are."""
    wanted = max(600, round(10_000 * scale))
    with served(replicas=1) as endpoint:
        closed_loop(target(endpoint), seconds=2)
        before = endpoint.memory_mb()
        statuses: Counter[str] = Counter()
        _by_description(endpoint, wanted // 2, statuses)
        _raw(endpoint, wanted - statuses.total(), statuses)
        after = endpoint.memory_mb()
        works = httpx.post(f"{endpoint.url}{BASE}/predict", json={"rows": rows()[:1]}, trust_env=False)
    worked = works.status_code == 200
    return {
        "requests": statuses.total(),
        "statuses": dict(statuses),
        "memory_growth_mb": round(after - before, 1),
        "holds": worked and not any(s.startswith("5") for s in statuses) and after - before < 50,
    }


def _by_description(endpoint: Served, count: int, statuses: Counter[str]) -> None:
    """What schemathesis makes of the OpenAPI document, mutated too."""
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    document = httpx.get(f"{endpoint.url}{BASE}/openapi.json", trust_env=False).json()
    found = schemathesis.openapi.from_dict(document)
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30) as client:
        for operation in (each.ok() for each in found.get_all_operations()):
            strategy = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

            @hypothesis.settings(
                max_examples=count // 3, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
            )  # fmt: skip
            @hypothesis.given(case=strategy)
            def ask(case: Any) -> None:
                sent = case.as_transport_kwargs(base_url=endpoint.url)
                request = {
                    k: sent[k] for k in ("method", "url", "headers", "json", "data", "params") if k in sent
                }
                try:
                    response = client.request(**request)
                except (httpx.InvalidURL, UnicodeEncodeError, ValueError, TypeError):
                    statuses["not sent"] += 1
                    return
                statuses[str(response.status_code)] += 1

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                ask()


def _raw(endpoint: Served, count: int, statuses: Counter[str]) -> None:
    chance = random.Random(0)
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
        line = chance.choice(lines) % BASE.encode()
        if number % 500 == 7:  # 50 MB in chunks
            statuses[_send(host, int(port), _chunked(line))] += 1
            continue
        body = chance.choice(bodies)
        length = len(body) if chance.random() < 0.8 else chance.choice([0, 1, 10**12, -1, 10**30])
        head = [line, b"Host: x", b"Connection: close", chance.choice(heads), b"Content-Length: %d" % length]
        if chance.random() < 0.7:
            head.insert(3, b"content-type: application/json")
        statuses[_send(host, int(port), [b"\r\n".join(head) + b"\r\n\r\n" + body])] += 1


def _chunked(line: bytes) -> Iterator[bytes]:
    yield line + b"\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(50):
        yield b"100000\r\n" + b" " * 2**20 + b"\r\n"
    yield b"0\r\n\r\n"


def _send(host: str, port: int, parts: Any) -> str:
    """The status that bytes get; `closed` if the connection ends without."""
    said = b""
    with socket.create_connection((host, port), timeout=20) as connection:
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            said = connection.recv(64)
    return said.split(b" ")[1].decode("latin-1") if said.startswith(b"HTTP/") else "closed"


def feedback(scale: float) -> dict[str, Any]:
    """Replicas are killed at 200 random points while clients send feedback: all acknowledged is there."""
    chance, acknowledged, ended = random.Random(0), [], threading.Event()

    def tell(part: int) -> None:
        number = 0
        with httpx.Client(trust_env=False, timeout=30) as client:
            while not ended.is_set():
                number += 1
                said = {"request_id": f"f-{part}-{number}", "reward": (number % 11) / 10}
                with contextlib.suppress(httpx.TransportError):
                    answer = client.post(f"{endpoint.url}{BASE}/feedback", json=said)
                    if answer.status_code == 202:  # nothing was predicted: stored apart, but durable
                        acknowledged.append((said["request_id"], said["reward"]))

    with served(replicas=3, limits={"feedback_per_hour": 10**9}) as endpoint:
        threads = [threading.Thread(target=tell, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        killed = told = 0
        while killed < max(6, round(200 * scale)):
            if len(acknowledged) < told + 8:
                time.sleep(0.05)  # nobody is asked before somebody answers again
                continue
            time.sleep(chance.uniform(0, 0.5))
            told = len(acknowledged)
            chance.choice(endpoint.replicas()).kill()
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
    """A shadow that hangs, against none: the same answers, as fast."""
    rounds, seconds = max(2, round(10 * scale)), max(3, 15 * scale)
    p99: dict[bool, list[float]] = {True: [], False: []}
    with served(replicas=1) as endpoint:
        question = {"rows": rows(), "unit": "user-1"}
        answers = set()
        for hanging in (False, True) * rounds:
            application = f"{NAME}@2"
            dark = {"dark": {"version": "2", "weight": 0, "shadow": True, "workers": application}}
            endpoint.deploy("1", **(dark if hanging else {}))
            for process in endpoint.replicas(application):
                process.suspend()
            headers = {"x-request-id": "the-same"}
            answer = httpx.post(
                f"{endpoint.url}{BASE}/predict", json=question, headers=headers, trust_env=False
            )
            answers.add(answer.content)
            open_loop(target(endpoint), per_s=200, seconds=1)
            p99[hanging].append(open_loop(target(endpoint), per_s=200, seconds=seconds).p99_s)
            for process in endpoint.replicas(application):
                process.kill()
    ratio = statistics.median(p99[True]) / statistics.median(p99[False])
    each = sorted(a / b for a, b in zip(p99[True], p99[False], strict=True))
    figures = {"p99_ratio": round(ratio, 3), "low": round(each[0], 3), "high": round(each[-1], 3)}
    return {**figures, "answers": len(answers), "holds": len(answers) == 1 and ratio <= 1.05}


@dataclass
class Step:
    """A load that comes at once, and what it meets."""

    seconds: list[float] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    second_s: float = float("inf")
    """When the second replica answered."""


def load_step(scale: float) -> dict[str, Any]:
    """From a load that one replica cannot carry to the second one answering, against Serve's defaults."""
    calm, seconds = max(5.0, 10 * scale), max(30.0, 90 * scale)
    # Many rows a request: the replica is to have enough to do, and not the clients.
    bodies = [json.dumps({"rows": rows() * 32}).encode()]
    autoscaling = {"min_replicas": 1, "max_replicas": 2}
    with served(autoscaling=autoscaling) as endpoint:
        asked = Target(f"{endpoint.url}{BASE}/predict", bodies)
        with _handle() as handle:
            ours = _step(asked, lambda _: _answering(handle), calm, seconds)
    (port,) = free_ports(1)
    with _defaults(port):
        seen: set[int] = set()

        def pids(answers: list[bytes]) -> int:
            seen.update(json.loads(answer)["replica"] for answer in answers)
            return len(seen)

        theirs = _step(Target(f"http://127.0.0.1:{port}/predict", bodies), pids, calm, seconds)
    if PLOT:
        _plot(ours, theirs, calm)
    ratio = ours.second_s / theirs.second_s
    return {
        "second_replica_s": [round(ours.second_s, 1), round(theirs.second_s, 1)],
        "ratio": round(ratio, 3),
        "holds": ratio <= 0.15,
    }


@contextlib.contextmanager
def _handle() -> Iterator[Any]:
    """To the endpoint's replicas."""
    from ray.serve.handle import DeploymentHandle

    handle: Any = DeploymentHandle(NAME, NAME)
    handle._init(_run_router_in_separate_loop=True)
    try:
        yield handle
    finally:
        handle.shutdown()


def _answering(handle: Any) -> int:
    """Replicas of ours that have answered something in the last minute."""
    return sum(bool(state.recent) for state in handle.broadcast("state").results())


def _step(asked: Target, replicas: Callable[[list[bytes]], int], calm: float, seconds: float) -> Step:
    """One client at first, then 24 at once; both ask on and on."""
    step, ended = Step(), threading.Event()
    answers: list[tuple[float, float, bytes]] = []
    begun = time.monotonic()

    def ask(delay: float) -> None:
        time.sleep(delay)
        with httpx.Client(trust_env=False, timeout=60) as client:
            headers, number = {"content-type": "application/json"}, 0
            while not ended.is_set():
                number += 1
                at = time.monotonic()
                body = asked.bodies[number % len(asked.bodies)]
                answer = client.post(asked.url, content=body, headers=headers)
                if answer.status_code == 200:
                    answers.append((time.monotonic(), time.monotonic() - at, answer.content))
                else:
                    time.sleep(0.1)
                time.sleep(0.05 if not delay else 0)

    threads = [threading.Thread(target=ask, args=(0.0 if not n else calm,)) for n in range(25)]
    for thread in threads:
        thread.start()
    while (now := time.monotonic()) < begun + calm + seconds:
        time.sleep(0.5)
        recent = [(took, content) for at, took, content in answers[-20_000:] if at > now - 1]
        count = replicas([content for _, content in recent])
        step.seconds.append(now - begun - calm)
        step.replicas.append(count)
        step.per_s.append(len(recent))
        took = sorted(took for took, _ in recent)
        step.p99_ms.append(1e3 * took[int(0.99 * (len(took) - 1))] if took else float("nan"))
        if count > 1 and step.second_s == float("inf"):
            step.second_s = now - begun - calm
        if count > 1 and now - begun - calm > step.second_s + 10:
            break
    ended.set()
    for thread in threads:
        thread.join()
    return step


@contextlib.contextmanager
def _defaults(port: int) -> Iterator[None]:
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


def _plot(ours: Step, theirs: Step, calm: float) -> None:
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
    axes[2].set_xlabel("seconds after the load came")
    figure.suptitle("24 clients come at once")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


PROOFS: dict[str, Callable[[float], dict[str, Any]]] = {
    proof.__name__: proof
    for proof in (kills, rollouts, overload, half_load, malformed, feedback, shadow, load_step, everything)
}

if __name__ == "__main__":
    main()
