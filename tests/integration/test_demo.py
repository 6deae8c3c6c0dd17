"""`raylway demo` with a state directory of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from app.config import projectfile
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


def demo(home) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    return subprocess.run(
        [sys.executable, "-m", "app", "demo"],
        cwd=ROOT, env={**environment, "RAYLWAY_HOME": str(home)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def scores(output: str) -> dict[str, float]:
    """The AUC of each row of the summary's table."""
    return {name: float(value) for name, value in re.findall(r"│ ([\w :]+?) +│ (0\.\d{4})", output)}


def test_the_demo_trains_two_models_serves_them_and_leaves_no_process(tmp_path):
    process = demo(tmp_path)
    output = process.stdout
    assert process.returncode == 0, output + process.stderr
    assert len(output.splitlines()) < 80
    auc = scores(output)
    assert auc["challenger: mlp"] >= 0.905
    assert auc["challenger: mlp"] > auc["logistic regression"] > auc["constant"]
    assert "income version 1 (champion)" in output
    assert "income version 2 (challenger)" in output
    assert re.search(r"champion (4|5)\d\.\d%, challenger (4|5)\d\.\d% of 400 units; 0 units changed", output)
    assert "0 of 1200 requests failed" in output
    assert "curl -s http://127.0.0.1:8000/v2/models/income/predict" in output
    log = tmp_path / "demo" / "logs"
    assert any(f.stat().st_size for f in log.glob("demo-*.log"))
    # No process of Ray is left: each has the demo's state directory in its environment.
    assert not [p for p in psutil.process_iter() if belongs(p, tmp_path / "demo")]


def belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("RAYLWAY_HOME") == str(home)
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_second_demo_trains_to_the_same_scores(tmp_path):
    """The second run has the same state directory and does not reuse the trained models."""
    first, second = demo(tmp_path), demo(tmp_path)
    assert first.returncode == second.returncode == 0
    epochs = projectfile.load("configs/income.yaml").training.epochs
    assert f"epoch {epochs}/{epochs}" in second.stdout
    assert scores(second.stdout) == pytest.approx(scores(first.stdout), abs=1e-3)
