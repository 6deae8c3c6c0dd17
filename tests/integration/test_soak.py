"""The proofs of benchmarks/soak.py that measure no time, shortened."""

import json
import os
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("proof", ["kills", "rollouts", "malformed", "feedback"])
def test_nothing_is_lost_and_nothing_breaks(proof):
    """Each proof starts its own cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--only", proof, "--scale", "0.1"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["proofs"][proof]
    assert found["holds"], found
