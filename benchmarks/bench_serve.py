"""Throughput and latency of an endpoint, against FastAPI, BentoML, MLServer and MLflow.

    python benchmarks/bench_serve.py [--rounds 5] [--only routing,half_load,...]

All servers run the same graph on the same rows, machine and niceness. One server runs at a time, and they
alternate within each round. `value` is the ratio of the medians, `low` and `high` the smallest and largest
ratio of one round. The last line is JSON.

Needs wrk (Debian: apt-get install wrk). BentoML and MLServer are installed into virtual environments in the
user's cache.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
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
from ratios import ratio

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
TEXT_PROJECT = "configs/tweets.yaml"
NUM_TEXTS = 600
"""Number of texts to train on. Few are enough: the speed of the graph does not depend on its weights."""
MAX_P99_S = 0.1
"""The 99th percentile of latency that the text endpoint must keep."""
LOAD_S = 6.0
"""Duration of one load."""
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
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help=f"comma-separated, from {', '.join(MEASURES)}")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(MEASURES)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="raylway-bench-") as home:
        os.environ["RAYLWAY_HOME"] = home
        if set(names) - {"texts"}:
            for seed in (0, 1):
                _raylway("train", PROJECT, *_set(*QUICK, f"seed={seed}"))
        ratios: dict[str, Any] = {}
        for name in names:
            ratios |= MEASURES[name](arguments.rounds)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    print(json.dumps({"benchmark": "serve", "machine": machine, "ratios": ratios}))


# The measurements


def requests_per_s(rounds: int) -> dict[str, Any]:
    """Requests per second of an endpoint with an A/B test, against each peer with one model."""
    servers = {"ours": ours, "fastapi": fastapi, "bentoml": bentoml, "mlserver": mlserver, "mlflow": mlflow}
    per_s = _closed_loops(servers, rounds)
    peers = [name for name in servers if name != "ours"]
    ratios = [ratio(GOALS, f"requests_per_s_vs_{peer}", per_s["ours"], per_s[peer]) for peer in peers]
    return {name: figures for ratio in ratios for name, figures in ratio.items()}


def routing(rounds: int) -> dict[str, Any]:
    """Requests per second of two variants, against one."""
    per_s = _closed_loops({"routed": ours, "unrouted": one_variant}, rounds)
    return ratio(GOALS, "routed_vs_unrouted", per_s["routed"], per_s["unrouted"])


def half_load(rounds: int) -> dict[str, Any]:
    """The 99th percentile of latency, each server at half of its own closed-loop rate."""
    p99_s: Rounds = {"ours": [], "fastapi": []}
    for _ in range(rounds):
        for name, server in (("ours", ours), ("fastapi", fastapi)):
            with server() as target:
                per_s = closed_loop(target, seconds=LOAD_S).requests_per_s / 2
                latency = open_loop(target, per_s=per_s, seconds=LOAD_S)
            p99_s[name].append(latency.p99_s)
            print(f"{name} at {per_s:,.0f}/s: p50 {latency.p50_s * 1e3:.2f} p99 {latency.p99_s * 1e3:.2f} ms")
    return ratio(GOALS, "p99_at_half_load_vs_fastapi", p99_s["ours"], p99_s["fastapi"])


def authentication(rounds: int) -> dict[str, Any]:
    """Requests per second with tokens, against without."""
    per_s = _closed_loops({"with tokens": authenticated, "without": ours}, rounds)
    return ratio(GOALS, "authenticated_vs_not", per_s["with tokens"], per_s["without"])


def texts(rounds: int) -> dict[str, Any]:
    """The highest rate of Poisson arrivals at which the 99th percentile of latency stays below MAX_P99_S: an
    int8 MiniLM classifier in workers of its own, against eager PyTorch behind FastAPI."""
    _prepare_texts()
    per_s: Rounds = {"ours": [], "fastapi": []}
    for _ in range(rounds):
        for name, server in (("ours", our_texts), ("fastapi", fastapi_texts)):
            with server() as target:
                per_s[name].append(_highest_rate(target))
            print(f"{name}: {per_s[name][-1]:,.0f} texts/s")
    return ratio(GOALS, "texts_per_s_vs_fastapi_torch", per_s["ours"], per_s["fastapi"])


def _highest_rate(target: Target) -> float:
    """The highest rate within MAX_P99_S, by bisection, to 3 % of the closed-loop rate."""
    low, high = 0.0, 1.1 * closed_loop(target, seconds=LOAD_S).requests_per_s
    for _ in range(5):
        per_s = (low + high) / 2
        try:
            sustained = open_loop(target, per_s=per_s, seconds=LOAD_S).p99_s <= MAX_P99_S
        except NotAnswered:
            sustained = False
        low, high = (per_s, high) if sustained else (low, per_s)
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
    bodies = [_json({"rows": [row], "unit": f"u{i}"}) for row, i in _numbered_rows()]
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
    bodies = [_json({"rows": [row]}) for row, _ in _numbered_rows()]
    with _running(
        command, Target(f"http://127.0.0.1:{port}/predict", bodies), BUNDLE=str(_bundle())
    ) as target:
        yield target


@contextlib.contextmanager
def bentoml() -> Iterator[Target]:
    (port,) = free_ports(1)
    command = [_environment("bentoml") / "bentoml", "serve", "bentoml_peer:Income", "--port", port]
    bodies = [_json({"rows": [row]}) for row, _ in _numbered_rows()]
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
        bodies = [_json({"inputs": [_tensor(*item) for item in row.items()]}) for row, _ in _numbered_rows()]
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
    # Tensors, not a table: MLflow would pass pandas strings on to ONNX Runtime, which rejects them.
    bodies = [
        _json({"inputs": {name: ["" if value is None else value] for name, value in row.items()}})
        for row, _ in _numbered_rows()
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
    with _running(
        [BIN / "raylway", "serve", TEXT_PROJECT, *_set(*settings)], Target(url, _text_bodies())
    ) as target:
        yield target


@contextlib.contextmanager
def fastapi_texts() -> Iterator[Target]:
    (port,) = free_ports(1)
    command = [BIN / "uvicorn", "text_peer:app", "--port", port, "--log-level", "warning"]
    bundle = versions.resolve("tweets", versions.CHAMPION).path
    text_target = Target(f"http://127.0.0.1:{port}/predict", _text_bodies())
    # PyTorch's default: one thread per core.
    with _running(
        command, text_target, BUNDLE=str(bundle), OMP_NUM_THREADS=str(psutil.cpu_count())
    ) as target:
        yield target


def _prepare_texts() -> None:
    """Register a briefly trained version as champion, and its int8 version as challenger."""
    tweets = pd.read_parquet(samples.path("tweets")).sample(NUM_TEXTS, random_state=0)
    file = Path(os.environ["RAYLWAY_HOME"]) / "tweets.parquet"
    tweets.to_parquet(file)
    source = f"data.source={{path: {file}}}"
    # Speed does not depend on quality: accept any.
    any_quality = ("gate.minimum={}", "gate.beat=[]", "compression.max_loss=1")
    _raylway("train", TEXT_PROJECT, *_set(source, "model.freeze=true", *any_quality))
    bundle = versions.resolve("tweets", versions.CHAMPION).path
    _raylway("compress", bundle, "--register")


def _text_bodies() -> list[bytes]:
    frame = pd.read_parquet(Path(os.environ["RAYLWAY_HOME"]) / "tweets.parquet")
    return [_json({"rows": [{"text": text}]}) for text in frame["text"].head(256)]


@contextlib.contextmanager
def _running(command: list[Any], target: Target, **variables: str) -> Iterator[Target]:
    """Run a server until the block ends. Its target is yielded once the server answers and is warm."""
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
        answered = "nothing"
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(
                target.url, content=target.bodies[0], headers=headers, trust_env=False, timeout=10
            )
            if answer.status_code == 200:
                return
            answered = f"{answer.status_code} {answer.text[:500]}"
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{target.url} does not answer with 200; its last answer was {answered}")
        time.sleep(0.2)


def _environment(peer: str) -> Path:
    """The bin folder of a peer's own virtual environment. The first call creates the environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raylway" / "peers"
    folder = cache / PACKAGES[peer][0]
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {PACKAGES[peer][0]}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", *PACKAGES[peer]], check=True)
        (folder / "complete").touch()
    return folder / "bin"


# How they are measured


def _closed_loops(servers: dict[str, Callable[[], Any]], rounds: int) -> Rounds:
    """Requests per second of each server, one value per round."""
    per_s: Rounds = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            with server() as target:
                result = closed_loop(target, seconds=LOAD_S)
            per_s[name].append(result.requests_per_s)
            print(f"{name}: {result.requests_per_s:,.0f} requests/s, p99 {result.p99_s * 1e3:.1f} ms")
    return per_s


def _numbered_rows() -> Iterator[tuple[dict[str, Any], int]]:
    """256 rows from the bundle's example, repeated as needed, each with its index."""
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
    process = subprocess.run([BIN / "raylway", *arguments], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        sys.exit(
            f"raylway {' '.join(map(str, arguments))}:\n{process.stdout[-2000:]}{process.stderr[-2000:]}"
        )
    return process.stdout


def _set(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


if __name__ == "__main__":
    main()
