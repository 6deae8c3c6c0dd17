"""The demo: one model's whole life on the census sample, and a summary that a person can read."""

import asyncio
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from app import cluster, projectfile
from app.console import Console
from app.home import home

PROJECT = "configs/income.yaml"
INCUMBENT = ("model={kind: linear}", "training.epochs=5", "training.learning_rate=0.03")
"""The first champion: a logistic regression, so that the network has something to beat."""
NUM_UNITS = 400
NUM_REQUESTS = 1200
CONCURRENCY = 4


@contextmanager
def own_home() -> Iterator[None]:
    """A state directory of the demo's own, emptied: it starts from nothing and touches nothing else."""
    before = os.environ.get("RAYLWAY_HOME")
    folder = home() / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["RAYLWAY_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAYLWAY_HOME"]
        else:
            os.environ["RAYLWAY_HOME"] = before


def run(console: Console) -> None:
    """Train two candidates, serve them against each other, ask them, and sum up."""
    started = time.perf_counter()
    port = cluster.free_ports(1)[0]
    incumbent = projectfile.load(PROJECT, INCUMBENT)
    project = projectfile.load(PROJECT, [f"serving.port={port}"])
    with cluster.session():
        from app import pipeline, registry
        from app.serving import deploy, variants

        console.say("1. A first champion: logistic regression", style="bold")
        first = pipeline.run(incumbent, console)
        console.say("2. A challenger: a neural network", style="bold")
        second = pipeline.run(project, console)
        console.say("3. Both answer requests, in an A/B test", style="bold")
        with console.stage("serve") as done:
            chosen = variants.choose(project, registry.find)
            url = deploy.deploy(project.serving, project.name, chosen.variants)
            done(f"{', '.join(f'{v.name} = version {v.version.number}' for v in chosen.variants)}")
        rows = json.loads((second.bundle / "example.json").read_text())["rows"]
        with console.stage("requests") as done:
            traffic = asyncio.run(_ask(f"{url}/predict", rows))
            done(f"{NUM_REQUESTS} requests of {NUM_UNITS} units, {CONCURRENCY} at a time")
        with console.stage("stop") as done:
            deploy.undeploy()
            done("nothing is left running")
    _summary(console, [first, second], traffic, [v.name for v in chosen.variants])
    _next_steps(console, project.name, rows[0])
    console.say(f"\nDone in {time.perf_counter() - started:.0f} s.", style="bold")


@dataclass(frozen=True)
class Traffic:
    """What the requests saw."""

    units: Counter[str]
    """Units by the variant that answered them."""
    moved: int
    """Units that were answered by more than one variant."""
    latencies_ms: list[float]
    failed: int


async def _ask(url: str, rows: list[dict[str, Any]]) -> Traffic:
    """Post NUM_REQUESTS rows, a few at a time, every unit several times."""
    import httpx

    answered: dict[str, set[str]] = {}
    latencies: list[float] = []
    failed = 0

    async def worker(client: httpx.AsyncClient, numbers: range) -> None:
        nonlocal failed
        for number in numbers:
            unit = f"user-{number % NUM_UNITS}"
            begun = time.perf_counter()
            answer = await client.post(url, json={"unit": unit, "rows": [rows[number % len(rows)]]})
            latencies.append((time.perf_counter() - begun) * 1e3)
            if answer.status_code == 200:
                answered.setdefault(unit, set()).add(answer.json()["variant"])
            else:
                failed += 1

    async with httpx.AsyncClient(timeout=30) as client:
        await asyncio.gather(
            *(worker(client, range(i, NUM_REQUESTS, CONCURRENCY)) for i in range(CONCURRENCY))
        )
    units = Counter(min(variants) for variants in answered.values())
    return Traffic(units, sum(len(v) > 1 for v in answered.values()), latencies, failed)


def _summary(console: Console, outcomes: list[Any], traffic: Traffic, variants: list[str]) -> None:
    quality = Table(
        "on the test part",
        "AUC",
        "accuracy",
        "F1",
        "calibration error",
        title="Quality",
        title_justify="left",
    )
    scores = {
        name.replace("_", " "): metrics for name, metrics in outcomes[-1].evaluation["baselines"].items()
    }
    for outcome, variant in zip(outcomes, ("champion", "challenger"), strict=True):
        label = (
            f"{variant}: version {outcome.version.number}"
            if outcome.version
            else f"{variant}: not registered"
        )
        scores[label] = outcome.evaluation["model"]
    for name, m in scores.items():
        quality.add_row(name, *(f"{m[k]:.4f}" for k in ("auc", "accuracy", "f1", "calibration_error")))
    console.say()
    console.say(quality)
    rows_per_s = np.median([epoch["rows_per_s"] for epoch in outcomes[-1].history])
    total = sum(traffic.units.values())
    split = ", ".join(f"{name} {traffic.units[name] / total:.1%}" for name in variants)
    p50, p99 = np.percentile(traffic.latencies_ms, [50, 99])
    console.say(f"training     {rows_per_s:,.0f} rows/s on two Horovod workers")
    console.say(f"A/B split    {split} of {total} units; {traffic.moved} units changed their variant")
    console.say(
        f"latency      p50 {p50:.1f} ms, p99 {p99:.1f} ms; {traffic.failed} of {NUM_REQUESTS} requests failed"
    )


def _next_steps(console: Console, name: str, row: dict[str, Any]) -> None:
    folder = _relative(home())
    database = f"sqlite:///{folder}/mlflow.db"
    body = json.dumps({"unit": "user-17", "rows": [row]})
    console.say("\nGo on from here:", style="bold")
    console.say(f"  runs and versions   .venv/bin/mlflow ui --backend-store-uri {database}")
    console.say(f"  keep it up          RAYLWAY_HOME={folder} .venv/bin/raylway serve {PROJECT}")
    port = projectfile.load(PROJECT).serving.port
    console.say(f"  then ask it         curl -s http://127.0.0.1:{port}/v2/models/{name}/predict -d '{body}'")


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
