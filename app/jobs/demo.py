"""The demo: one model's whole life on the census sample, and a summary that a person can read."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from app.cluster.ports import free_ports
from app.cluster.session import session
from app.config import projectfile
from app.console import Console, short
from app.state import files
from app.state.home import home

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
    files.discard(folder)
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
    port = free_ports(1)[0]
    incumbent = projectfile.load(PROJECT, INCUMBENT)
    project = projectfile.load(PROJECT, [f"serving.port={port}"])
    with session():
        from app.jobs import pipeline, serve
        from app.serving.traffic.registered import registered_traffic

        console.say("1. A first champion: logistic regression", style="bold")
        first = pipeline.run(incumbent, console)
        console.say("2. A challenger: a neural network", style="bold")
        second = pipeline.run(project, console)
        console.say("3. Both answer requests, in an A/B test", style="bold")
        with console.stage("serve") as done:
            chosen, _ = registered_traffic(project.name, project.serving)
            server = serve.deploy(project, chosen)
            done(
                ", ".join(f"{name} = version {variant.version}" for name, variant in chosen.variants.items())
            )
        rows = json.loads((second.bundle / "example.json").read_text())["rows"]
        with console.stage("requests") as done:
            traffic = asyncio.run(_ask(f"{server}/v2/models/{project.name}/predict", rows))
            done(f"{NUM_REQUESTS} requests of {NUM_UNITS} units, {CONCURRENCY} at a time")
    trained = {f"champion: {incumbent.model.kind}": first, f"challenger: {project.model.kind}": second}
    _summary(console, trained, traffic, list(chosen.variants))
    _next_steps(console, project.name, chosen.variants["challenger"])
    seconds = time.perf_counter() - started
    console.say(f"\nDone in {seconds:.0f} s; nothing is left running.", style="bold")


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


def _summary(console: Console, trained: dict[str, Any], traffic: Traffic, variants: list[str]) -> None:
    columns = ("on the test part", "AUC", "accuracy", "F1", "calibration error")
    quality = Table(*columns, title="Quality", title_justify="left")
    last = list(trained.values())[-1]
    scores = {name.replace("_", " "): metrics for name, metrics in last.evaluation["baselines"].items()}
    scores |= {name: outcome.evaluation["model"] for name, outcome in trained.items()}
    for name, m in scores.items():
        quality.add_row(name, *(f"{m[k]:.4f}" for k in ("auc", "accuracy", "f1", "calibration_error")))
    console.say()
    console.say(quality)
    rows_per_s = np.median([epoch["rows_per_s"] for epoch in last.history])
    total = sum(traffic.units.values())
    split = ", ".join(f"{name} {traffic.units[name] / total:.1%}" for name in variants)
    p50, p99 = np.percentile(traffic.latencies_ms, [50, 99])
    console.say(f"training     {rows_per_s:,.0f} rows/s on two Horovod workers")
    console.say(f"A/B split    {split} of {total} units; {traffic.moved} units changed their variant")
    console.say(
        f"latency      p50 {p50:.1f} ms, p99 {p99:.1f} ms; {traffic.failed} of {NUM_REQUESTS} requests failed"
    )


def _next_steps(console: Console, name: str, variant: Any) -> None:
    from app.serving.control import deploy

    folder = short(home())
    port = projectfile.load(PROJECT).serving.port
    console.say("\nGo on from here:", style="bold")
    console.say("  runs and versions")
    console.say(f"    .venv/bin/mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db")
    console.say("  keep the endpoint up")
    console.say(f"    RAYLWAY_HOME={folder} .venv/bin/raylway serve {PROJECT}")
    console.say("  then ask it, from another shell")
    console.say(f"    {deploy.example_command(f'http://127.0.0.1:{port}', name, variant)}")
