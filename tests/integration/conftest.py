"""One cluster for all integration tests: started by `up`, joined by this process and by the commands."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.cluster import local
from app.cluster.session import session
from tests import postgres

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


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server, see `tests.postgres.Server`."""
    programs = postgres.programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres.started(programs) as started:
        yield started


@pytest.fixture(scope="session")
def reach(home):
    """How to reach the cluster, as `raylway up` says it."""
    yield local.up()
    local.down()


@pytest.fixture(scope="session")
def ray_cluster(reach):
    """This process, joined to the cluster."""
    with session(log_to_driver=False):
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


@pytest.fixture
def replicas(reach):
    """The processes of an application of Ray Serve, those of them that live."""

    def of(application: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(reach.cluster.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ends while it is looked at
                if f"ServeReplica:{application}:" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    return of


class Observed:
    """What the ranks of a training have noted, as files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def observe(self, before: Callable | None = None, seconds_per_step: float = 0.0) -> Callable:
        """The loop, but each rank calls `before(loop, rank)`, and notes its process, steps and parameters."""
        folder = self.folder

        def train_loop(settings):
            import hashlib
            import os
            import time

            import ray.train

            from app.training import loop

            rank, step = ray.train.get_context().get_world_rank(), loop._step
            with (folder / f"steps-{rank}").open("ab", buffering=0) as steps:

                def noted(*arguments):
                    time.sleep(seconds_per_step)
                    loss = step(*arguments)
                    steps.write(b".")
                    return loss

                loop._step = noted
                if before:
                    before(loop, rank)
                (folder / f".pid-{rank}").write_text(str(os.getpid()))
                (folder / f".pid-{rank}").rename(folder / f"pid-{rank}")
                model = loop.train(settings)
            parameters = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
            (folder / f"parameters-{rank}").write_text(hashlib.sha256(parameters).hexdigest())

        return train_loop

    def pids(self) -> dict[int, int]:
        """The process of each rank, of those that have begun last."""
        return {
            int(file.name.removeprefix("pid-")): int(file.read_text()) for file in self.folder.glob("pid-*")
        }

    def num_steps(self) -> int:
        """Steps of all processes that have been the same rank, of the rank that made most."""
        return max(file.stat().st_size for file in self.folder.glob("steps-*"))

    def parameters(self) -> list[str]:
        """A hash of each rank's parameters at the end."""
        return [file.read_text() for file in sorted(self.folder.glob("parameters-*"))]


@pytest.fixture
def observed(monkeypatch, tmp_path):
    """Has the next trainings observed: `observed(before, seconds_per_step)`, see Observed.observe."""
    from app.training import trainer

    def observe(*arguments) -> Observed:
        seen = Observed(tmp_path)
        monkeypatch.setattr(trainer.loop, "train_loop", seen.observe(*arguments))
        return seen

    return observe
