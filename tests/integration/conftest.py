"""One cluster for all integration tests: `up` starts it, this process and the commands join it."""

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.cluster import local
from app.cluster.session import session
from tests import postgres
from tests.command_server import CommandServer, Process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The state directory of the shared cluster."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(path))
        # Tests undeploy endpoints often, and no client waits for the drain.
        patch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield path


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server, see `tests.postgres.Server`."""
    programs = postgres.programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres.started(programs) as server:
        yield server


@pytest.fixture(scope="session")
def reach(home):
    """The shared cluster, as `up` returns it."""
    yield local.up()
    local.down()


@pytest.fixture(scope="session")
def ray_cluster(reach):
    """Joins this process to the shared cluster."""
    with session(log_to_driver=False):
        yield


@pytest.fixture(scope="session")
def command_server(reach, tmp_path_factory):
    """See tests/command_server.py."""
    server = CommandServer(os.environ, tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def raylway(command_server, home):
    """Run a command on the shared cluster; `env` adds to the environment."""

    def run(*arguments: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess:
        return command_server.run(arguments, {**os.environ, "RAYLWAY_HOME": str(home), **env}, timeout)

    return run


@pytest.fixture(scope="session")
def started(command_server, home):
    """Start a command on the shared cluster, for a `with` block that follows its output."""

    def start(*arguments: str) -> Process:
        return command_server.start(arguments, {**os.environ, "RAYLWAY_HOME": str(home)})

    return start


@pytest.fixture
def replicas(reach):
    """The live replica processes of an application of Ray Serve."""

    def of(application: str) -> list[psutil.Process]:
        processes = []
        for process in psutil.Process(reach.cluster.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended in the meantime
                if f"ServeReplica:{application}:" in " ".join(process.cmdline()):
                    processes.append(process)
        return processes

    return of


class Ranks:
    """Notes that the ranks of a training write to files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def wrap(
        self,
        seconds_per_step: float = 0.0,
        on_begin: Callable[[int, int, int], None] = lambda rank, epoch, step: None,
        on_step: Callable[[int, int], None] = lambda rank, num_steps: None,
    ) -> Callable:
        """The argument `wrap` of `trainer.train`: the observer of a rank sleeps after each step, and notes
        the process, the steps and the parameters of its rank.

        It calls `on_begin` with rank, epoch and step, and `on_step` after each step with the rank and the
        number of steps that its process has made.
        """
        folder = self.folder

        def wrap(observer):
            import hashlib
            import os
            import time

            import ray.train

            rank = ray.train.get_context().get_world_rank()

            class NotingObserver:
                def __init__(self):
                    self._num_steps = 0
                    self._steps = (folder / f"steps-{rank}").open("ab", buffering=0)
                    (folder / f".pid-{rank}").write_text(str(os.getpid()))
                    (folder / f".pid-{rank}").rename(folder / f"pid-{rank}")

                def __getattr__(self, name):
                    return getattr(observer, name)

                def begin(self, network, epoch, step):
                    self._network = network
                    on_begin(rank, epoch, step)

                def step(self, epoch, step):
                    self._steps.write(b".")
                    self._num_steps += 1
                    time.sleep(seconds_per_step)
                    on_step(rank, self._num_steps)

                def end(self, ending):
                    parameters = b"".join(p.detach().numpy().tobytes() for p in self._network.parameters())
                    (folder / f"parameters-{rank}").write_text(hashlib.sha256(parameters).hexdigest())
                    self._steps.close()
                    observer.end(ending)

            return NotingObserver()

        return wrap

    def pids(self) -> dict[int, int]:
        """The process id of each rank, in the group that started last."""
        return {
            int(file.name.removeprefix("pid-")): int(file.read_text()) for file in self.folder.glob("pid-*")
        }

    def num_steps(self) -> int:
        """Number of steps of the rank that made most, summed over all processes that had this rank."""
        return max(file.stat().st_size for file in self.folder.glob("steps-*"))

    def parameters(self) -> list[str]:
        """A hash of each rank's parameters at the end."""
        return [file.read_text() for file in sorted(self.folder.glob("parameters-*"))]


@pytest.fixture
def ranks(tmp_path) -> Ranks:
    return Ranks(tmp_path)
