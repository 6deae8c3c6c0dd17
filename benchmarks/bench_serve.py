"""How fast an endpoint answers, against what people would use instead.

    python benchmarks/bench_serve.py [--rounds 5] [--only closed_loop,half_load,...]

The same graph, rows, machine and niceness on all sides; each server runs alone while it is asked, rounds take
turns, ratios of medians; low and high are the smallest and largest ratio of a round. The last line is JSON.

It needs wrk (Debian: apt-get install wrk). The peers get environments of their own in the user's cache.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
from load import NotAnswered, Target, closed_loop, open_loop

from app.cluster.ports import free_ports
from app.data.sources import samples
from app.registry import versions

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PEERS = Path(__file__).with_name("serve_peers")
PACKAGES = {
    "bentoml": ["bentoml==1.4.39", "onnxruntime", "numpy"],
    "mlserver": ["mlserver==1.7.1", "onnxruntime", "numpy"],
}
PROJECT = "configs/income.yaml"
QUICK = (
    "model={kind: mlp, hidden: [128, 64]}",
    "training.epochs=1",
    "gate={minimum: {auc: 0.5}, tolerance: 1}",
)
TEXTS = "configs/tweets.yaml"
FEW_TEXTS = 600
"""To train on: how fast the graph is does not depend on what it has learnt."""
P99_S = 0.1
"""Within which the text endpoint has to answer."""
SECONDS = 6.0
GOALS = {
    "requests_per_s_vs_fastapi": (0.6, "higher"),
    "requests_per_s_vs_bentoml": (1.5, "higher"),
    "requests_per_s_vs_mlserver": (1.5, "higher"),
    "requests_per_s_vs_mlflow": (1.5, "higher"),
    "routed_vs_unrouted": (0.95, "higher"),
    "authenticated_vs_not": (0.9, "higher"),
    "p99_at_half_load_vs_fastapi": (2.5, "lower"),
    "texts_per_s_vs_fastapi_torch": (3.0, "higher"),
}

Rounds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help=f"of {', '.join(MEASURES)}")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else list(MEASURES)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="raylway-bench-") as home:
        os.environ["RAYLWAY_HOME"] = home
        if set(wanted) - {"texts"}:
            for seed in (0, 1):
                _raylway("train", PROJECT, *_set(*QUICK, f"seed={seed}"))
        ratios: dict[str, Any] = {}
        for name in wanted:
            ratios |= MEASURES[name](arguments.rounds)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    print(json.dumps({"benchmark": "serve", "machine": machine, "ratios": ratios}))


# What is measured


def requests_per_s(rounds: int) -> dict[str, Any]:
    """An endpoint with an A/B test, against one model behind each of the peers."""
    servers = {"ours": ours, "fastapi": fastapi, "bentoml": bentoml, "mlserver": mlserver, "mlflow": mlflow}
    found = _closed(servers, rounds)
    peers = [name for name in servers if name != "ours"]
    ratios = [_ratio(f"requests_per_s_vs_{peer}", found["ours"], found[peer]) for peer in peers]
    return {name: figures for ratio in ratios for name, figures in ratio.items()}


def routing(rounds: int) -> dict[str, Any]:
    """Two variants against one."""
    found = _closed({"routed": ours, "unrouted": one_variant}, rounds)
    return _ratio("routed_vs_unrouted", found["routed"], found["unrouted"])


def half_load(rounds: int) -> dict[str, Any]:
    """The 99th percentile of the latency at half of what each takes at most."""
    found: Rounds = {"ours": [], "fastapi": []}
    for _ in range(rounds):
        for name, server in (("ours", ours), ("fastapi", fastapi)):
            with server() as target:
                most = closed_loop(target, seconds=SECONDS).requests_per_s
                given = open_loop(target, per_s=most / 2, seconds=SECONDS)
            found[name].append(given.p99_s)
            _say(f"{name} at {most / 2:,.0f}/s: p50 {given.p50_s * 1e3:.2f} p99 {given.p99_s * 1e3:.2f} ms")
    return _ratio("p99_at_half_load_vs_fastapi", found["ours"], found["fastapi"])


def authentication(rounds: int) -> dict[str, Any]:
    """With tokens against without."""
    found = _closed({"with tokens": authenticated, "without": ours}, rounds)
    return _ratio("authenticated_vs_not", found["with tokens"], found["without"])


def texts(rounds: int) -> dict[str, Any]:
    """The highest rate of a Poisson process whose 99th percentile stays below P99_S: the int8 version of a
    MiniLM classifier in workers of its own, against eager PyTorch behind FastAPI."""
    _prepare_texts()
    found: Rounds = {"ours": [], "fastapi": []}
    for _ in range(rounds):
        for name, server in (("ours", our_texts), ("fastapi", fastapi_texts)):
            with server() as target:
                found[name].append(_highest(target))
            _say(f"{name}: {found[name][-1]:,.0f} texts/s")
    return _ratio("texts_per_s_vs_fastapi_torch", found["ours"], found["fastapi"])


def _highest(target: Target) -> float:
    """By bisection, to 3 % of what a closed loop gets."""
    low, high = 0.0, 1.1 * closed_loop(target, seconds=SECONDS).requests_per_s
    for _ in range(5):
        per_s = (low + high) / 2
        try:
            carried = open_loop(target, per_s=per_s, seconds=SECONDS).p99_s <= P99_S
        except NotAnswered:
            carried = False
        low, high = (per_s, high) if carried else (low, per_s)
    return low


MEASURES: dict[str, Callable[[int], dict[str, Any]]] = {
    function.__name__: function for function in (requests_per_s, routing, authentication, half_load, texts)
}

# The servers


@contextlib.contextmanager
def ours(*settings: str, headers: tuple[tuple[str, str], ...] = ()) -> Iterator[Target]:
    (port,) = free_ports(1)
    arguments = _set(*QUICK, f"serving.port={port}", "serving.autoscaling.max_replicas=1", *settings)
    url = f"http://127.0.0.1:{port}/v2/models/income/predict"
    bodies = [_json({"rows": [row], "unit": f"u{i}"}) for row, i in _questions()]
    with _running([BIN / "raylway", "serve", PROJECT, *arguments], Target(url, bodies, headers)) as target:
        yield target


def authenticated() -> contextlib.AbstractContextManager[Target]:
    token = _raylway("token", "bench").strip()
    return ours("serving.auth=local", headers=(("authorization", f"Bearer {token}"),))


def one_variant() -> contextlib.AbstractContextManager[Target]:
    return ours("serving.variants={champion: {version: champion, weight: 1}}")


@contextlib.contextmanager
def fastapi() -> Iterator[Target]:
    (port,) = free_ports(1)
    command = [BIN / "uvicorn", "fastapi_peer:app", "--port", port, "--log-level", "warning"]
    bodies = [_json({"rows": [row]}) for row, _ in _questions()]
    with _running(
        command, Target(f"http://127.0.0.1:{port}/predict", bodies), BUNDLE=str(_bundle())
    ) as target:
        yield target


@contextlib.contextmanager
def bentoml() -> Iterator[Target]:
    (port,) = free_ports(1)
    command = [_environment("bentoml") / "bentoml", "serve", "bentoml_peer:Income", "--port", port]
    bodies = [_json({"rows": [row]}) for row, _ in _questions()]
    with _running(
        command, Target(f"http://127.0.0.1:{port}/predict", bodies), BUNDLE=str(_bundle())
    ) as target:
        yield target


@contextlib.contextmanager
def mlserver() -> Iterator[Target]:
    http, grpc, metrics = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
        settings = {"parallel_workers": 0, "host": "127.0.0.1", **ports}
        model = {"implementation": "mlserver_peer.Income", "parameters": {"uri": str(_bundle())}}
        (Path(folder) / "settings.json").write_text(json.dumps(settings))
        (Path(folder) / "model-settings.json").write_text(json.dumps({"name": "income", **model}))
        bodies = [_json({"inputs": [_tensor(*item) for item in row.items()]}) for row, _ in _questions()]
        target = Target(f"http://127.0.0.1:{http}/v2/models/income/infer", bodies)
        with _running([_environment("mlserver") / "mlserver", "start", folder], target) as target:
            yield target


@contextlib.contextmanager
def mlflow() -> Iterator[Target]:
    (port,) = free_ports(1)
    command = [
        *(BIN / "mlflow", "models", "serve", "--model-uri", _bundle()),
        *("--env-manager", "local", "--port", port, "--workers", "1"),
    ]
    # Not as a table: MLflow would hand ONNX Runtime pandas' strings, which it does not take.
    bodies = [
        _json({"inputs": {name: ["" if value is None else value] for name, value in row.items()}})
        for row, _ in _questions()
    ]
    with _running(command, Target(f"http://127.0.0.1:{port}/invocations", bodies)) as target:
        yield target


@contextlib.contextmanager
def our_texts() -> Iterator[Target]:
    (port,) = free_ports(1)
    workers = "{min_replicas: 2, max_replicas: 2, num_cpus: 0.5, max_batch_rows: 16}"
    settings = (
        f"serving.port={port}",
        "serving.num_cpus=0.5",
        f"serving.variants={{champion: {{version: challenger, weight: 1, workers: {workers}}}}}",
    )
    url = f"http://127.0.0.1:{port}/v2/models/tweets/predict"
    with _running([BIN / "raylway", "serve", TEXTS, *_set(*settings)], Target(url, _texts())) as target:
        yield target


@contextlib.contextmanager
def fastapi_texts() -> Iterator[Target]:
    (port,) = free_ports(1)
    command = [BIN / "uvicorn", "text_peer:app", "--port", port, "--log-level", "warning"]
    bundle = versions.resolve("tweets", versions.CHAMPION).path
    given = Target(f"http://127.0.0.1:{port}/predict", _texts())
    # PyTorch with a thread for each core, as it comes.
    with _running(command, given, BUNDLE=str(bundle), OMP_NUM_THREADS=str(psutil.cpu_count())) as target:
        yield target


def _prepare_texts() -> None:
    """A registered version that learns a little, and its int8 version."""
    tweets = pd.read_parquet(samples.path("tweets")).sample(FEW_TEXTS, random_state=0)
    file = Path(os.environ["RAYLWAY_HOME"]) / "tweets.parquet"
    tweets.to_parquet(file)
    source = f"data.source={{path: {file}}}"
    # What it loses by int8 is no matter of speed.
    eased = ("gate.minimum={}", "gate.beat=[]", "compression.max_loss=1")
    _raylway("train", TEXTS, *_set(source, "model.freeze=true", *eased))
    bundle = versions.resolve("tweets", versions.CHAMPION).path
    _raylway("compress", bundle, "--register")


def _texts() -> list[bytes]:
    frame = pd.read_parquet(Path(os.environ["RAYLWAY_HOME"]) / "tweets.parquet")
    return [_json({"rows": [{"text": text}]}) for text in frame["text"].head(256)]


@contextlib.contextmanager
def _running(command: list[Any], target: Target, **variables: str) -> Iterator[Target]:
    """A server until the block ends; asked until it answers and then for a second, to warm it up."""
    path = os.pathsep.join([str(ROOT), str(PEERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            _wait(server, target)
            closed_loop(target, seconds=1)
            yield target
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        finally:
            children = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
            server.terminate()
            server.wait(timeout=60)
            psutil.wait_procs(children, timeout=10)


def _wait(server: subprocess.Popen, target: Target) -> None:
    headers = {"content-type": "application/json", **dict(target.headers)}
    deadline = time.monotonic() + 90
    while True:
        said = "nothing"
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(
                target.url, content=target.bodies[0], headers=headers, trust_env=False, timeout=10
            )
            if answer.status_code == 200:
                return
            said = f"{answer.status_code} {answer.text[:500]}"
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{target.url} does not answer; the last it said was {said}")
        time.sleep(0.2)


def _environment(peer: str) -> Path:
    """The programs of a peer's own environment, made when it is first needed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raylway" / "peers"
    folder = cache / PACKAGES[peer][0]
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _say(f"installing {PACKAGES[peer][0]}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", *PACKAGES[peer]], check=True)
        (folder / "made").touch()
    return folder / "bin"


# How


def _closed(servers: dict[str, Callable[[], Any]], rounds: int) -> Rounds:
    found: Rounds = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            with server() as target:
                given = closed_loop(target, seconds=SECONDS)
            found[name].append(given.requests_per_s)
            _say(f"{name}: {given.requests_per_s:,.0f} requests/s, p99 {given.p99_s * 1e3:.1f} ms")
    return found


def _questions() -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of the bundle's example, each with a number, 256 in all."""
    rows = json.loads((_bundle() / "example.json").read_text())["rows"]
    return zip(itertools.cycle(rows), range(256), strict=False)


def _tensor(name: str, value: Any) -> dict[str, Any]:
    datatype = "FP64" if isinstance(value, (int, float)) else "BYTES"
    return {"name": name, "datatype": datatype, "shape": [1, 1], "data": ["" if value is None else value]}


def _bundle() -> Path:
    return versions.resolve("income", versions.CHAMPION).path


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _raylway(*arguments: Any) -> str:
    done = subprocess.run([BIN / "raylway", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"raylway {' '.join(map(str, arguments))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _set(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _ratio(name: str, ours: list[float], peers: list[float]) -> dict[str, Any]:
    goal, better = GOALS[name]
    value = statistics.median(ours) / statistics.median(peers)
    each = [a / b for a, b in zip(ours, peers, strict=True)]
    holds = value <= goal if better == "lower" else value >= goal
    figures = {"value": value, "low": min(each), "high": max(each), "goal": goal}
    entry = {k: round(v, 3) for k, v in figures.items()} | {"better": better, "holds": holds}
    _say(f"{name}: {entry}")
    return {name: entry}


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
