"""Training as a Ray Job, submitted with `ray job submit`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


def submit(reach, *command: str) -> subprocess.CompletedProcess:
    exports = "\n".join(line for line in str(reach).splitlines() if line.startswith("export"))
    ray = Path(sys.executable).with_name("ray")
    script = f'{exports}\nexec {ray} job submit --working-dir . -- "$@"'
    environment = {k: v for k, v in os.environ.items() if k not in ("RAYLWAY_HOME", "RAY_ADDRESS")}
    return subprocess.run(
        ["bash", "-c", script, "-", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_job_trains_and_registers(reach, home):
    small = ("--set", "training.num_workers=1", "--set", "training.epochs=2")
    train = ("python", "-m", "app", "train", "configs/smoke.yaml", "--set", "name=job", *small)
    done = submit(reach, *train)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "job version 1 (champion)" in done.stdout
    assert "epoch 2/2" in done.stdout
    # The bundle is in the state directory of the cluster, not in the job's working directory.
    from app.registry import versions

    assert versions.resolve("job", "champion").path.is_relative_to(home)


def test_a_job_that_fails_makes_submit_fail_with_its_message(reach):
    failed = submit(reach, "python", "-m", "app", "train", "configs/smoke.yaml", "--set", "training.epochs=0")
    assert failed.returncode != 0
    assert "training.epochs: must be at least 1" in failed.stdout
