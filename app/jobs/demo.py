"""The demo: all stages of one model on the census sample, from data to an A/B test, and a summary."""

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
from app.console import Console, short_path
from app.state import files
from app.state.home import home

PROJECT = "configs/income.yaml"
FIRST_CHAMPION = ("model={kind: linear}", "training.epochs=5", "training.learning_rate=0.03")
"""Overrides for the first champion, a logistic regression, with which the network is compared."""
NUM_UNITS = 400
NUM_REQUESTS = 1200
NUM_CLIENTS = 4
"""Number of clients, each of which sends one request at a time."""
REQUEST_TIMEOUT_S = 30
QUALITY_COLUMNS = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "f1": "F1",
    "calibration_error": "calibration error",
}
"""Metrics in the table of quality, with their headings."""


@contextmanager
def demo_home() -> Iterator[None]:
    """An empty state directory for the demo, during the block, so that no other state is used or changed."""
    previous = os.environ.get("RAYLWAY_HOME")
    folder = home() / "demo"
    files.discard(folder)
    os.environ["RAYLWAY_HOME"] = str(folder)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["RAYLWAY_HOME"]
        else:
            os.environ["RAYLWAY_HOME"] = previous


def run(console: Console) -> None:
    """Train two candidates, serve them in an A/B test, send requests, and print a summary."""
    started = time.perf_counter()
    port = free_ports(1)[0]
    first_project = projectfile.load(PROJECT, FIRST_CHAMPION)
    project = projectfile.load(PROJECT, [f"serving.port={port}"])
    with session():
        from app.jobs import pipeline, serve
        from app.serving.traffic.registered import registered_traffic

        console.print("1. A first champion: logistic regression", style="bold")
        first = pipeline.run(first_project, console)
        console.print("2. A challenger: a neural network", style="bold")
        second = pipeline.run(project, console)
        console.print("3. Both answer requests, in an A/B test", style="bold")
        with console.stage("serve") as done:
            chosen, _ = registered_traffic(project.name, project.serving)
            server = serve.deploy(project, chosen)
            variants = chosen.variants.items()
            done(", ".join(f"{name} = version {variant.version}" for name, variant in variants))
        rows = json.loads((second.bundle / "example.json").read_text())["rows"]
        with console.stage("requests") as done:
            traffic = asyncio.run(_send_requests(f"{server}/v2/models/{project.name}/predict", rows))
            done(f"{NUM_REQUESTS} requests of {NUM_UNITS} units, {NUM_CLIENTS} at a time")
    outcomes = {
        f"champion: {first_project.model.kind}": first,
        f"challenger: {project.model.kind}": second,
    }
    _print_summary(console, outcomes, traffic, list(chosen.variants))
    _print_next_steps(console, project.name, chosen.variants["challenger"])
    seconds = time.perf_counter() - started
    console.print(f"\nDone in {seconds:.0f} s; nothing is left running.", style="bold")


@dataclass(frozen=True)
class Traffic:
    """Answers to the demo's requests."""

    units: Counter[str]
    """Number of units per variant."""
    num_moved: int
    """Number of units that were answered by more than one variant."""
    latencies_ms: list[float]
    num_failed: int


async def _send_requests(url: str, rows: list[dict[str, Any]]) -> Traffic:
    """Send NUM_REQUESTS requests of one row, several for each unit."""
    import httpx

    variants_by_unit: dict[str, set[str]] = {}
    latencies_ms: list[float] = []
    num_failed = 0

    async def send(client: httpx.AsyncClient, numbers: range) -> None:
        nonlocal num_failed
        for number in numbers:
            unit = f"user-{number % NUM_UNITS}"
            started = time.perf_counter()
            response = await client.post(url, json={"unit": unit, "rows": [rows[number % len(rows)]]})
            latencies_ms.append((time.perf_counter() - started) * 1e3)
            if response.status_code == 200:
                variants_by_unit.setdefault(unit, set()).add(response.json()["variant"])
            else:
                num_failed += 1

    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        await asyncio.gather(*(send(client, range(i, NUM_REQUESTS, NUM_CLIENTS)) for i in range(NUM_CLIENTS)))
    units = Counter(min(variants) for variants in variants_by_unit.values())
    num_moved = sum(len(variants) > 1 for variants in variants_by_unit.values())
    return Traffic(units, num_moved, latencies_ms, num_failed)


def _print_summary(console: Console, outcomes: dict[str, Any], traffic: Traffic, variants: list[str]) -> None:
    quality = Table("on the test part", *QUALITY_COLUMNS.values(), title="Quality", title_justify="left")
    last = list(outcomes.values())[-1]
    scores = {name.replace("_", " "): metrics for name, metrics in last.evaluation["baselines"].items()}
    scores |= {name: outcome.evaluation["model"] for name, outcome in outcomes.items()}
    for name, metrics in scores.items():
        quality.add_row(name, *(f"{metrics[metric]:.4f}" for metric in QUALITY_COLUMNS))
    console.print()
    console.print(quality)
    rows_per_s = np.median([epoch["rows_per_s"] for epoch in last.history])
    num_units = sum(traffic.units.values())
    shares = ", ".join(f"{name} {traffic.units[name] / num_units:.1%}" for name in variants)
    p50, p99 = np.percentile(traffic.latencies_ms, [50, 99])
    console.print(f"training     {rows_per_s:,.0f} rows/s on two Horovod workers")
    console.print(
        f"A/B split    {shares} of {num_units} units; {traffic.num_moved} units changed their variant"
    )
    console.print(
        f"latency      p50 {p50:.1f} ms, p99 {p99:.1f} ms; {traffic.num_failed} of {NUM_REQUESTS} requests "
        "failed"
    )


def _print_next_steps(console: Console, name: str, variant: Any) -> None:
    from app.serving.control import deploy

    folder = short_path(home())
    port = projectfile.load(PROJECT).serving.port
    console.print("\nContinue from here:", style="bold")
    console.print("  show runs and versions")
    console.print(f"    .venv/bin/mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db")
    console.print("  keep the endpoint up")
    console.print(f"    RAYLWAY_HOME={folder} .venv/bin/raylway serve {PROJECT}")
    console.print("  then send a request, from another shell")
    console.print(f"    {deploy.example_command(f'http://127.0.0.1:{port}', name, variant)}")
