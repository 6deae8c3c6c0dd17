"""One cluster for all integration tests: started by `up`, joined by this process and by the commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import cluster, local_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The state directory of the shared cluster."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(path))
        # Tests take endpoints off and put others on; nobody is waiting for a drained answer.
        patch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield path


@pytest.fixture(scope="session")
def reach(home):
    """How to reach the cluster, as `raylway up` says it."""
    yield local_cluster.up()
    local_cluster.down()


@pytest.fixture(scope="session")
def ray_cluster(reach):
    """This process, joined to the cluster."""
    with cluster.session(log_to_driver=False):
        yield


@pytest.fixture
def raylway(reach, home):
    """Run a command as a user does; `env` adds to the environment."""

    def run(*arguments: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "app", *arguments],
            cwd=ROOT,
            env={**os.environ, "RAYLWAY_HOME": str(home), **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
