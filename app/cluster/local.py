"""`raylway up` and `raylway down`: a Ray cluster on this machine that outlives the command that starts it."""

import contextlib
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
import psutil

from app.cluster.guardian import OwnedDirectory, create_directory, reap
from app.cluster.ports import free_ports
from app.cluster.record import Cluster, read_record
from app.cluster.requirements import require_tested_versions
from app.cluster.session import ensure_token, local_environment, temp_dir
from app.errors import UserError
from app.state import files
from app.state.home import home, make_private

START_TIMEOUT_S = 90.0
"""Maximum time for a head to start. It takes about 7 s on two idle cores."""
STOP_TIMEOUT_S = 15.0
"""Time for a head to stop its processes before they are killed. It takes about 4 s on an idle machine."""
ADDRESS_FILE = "ray_current_cluster"
"""File in Ray's directory that holds the head's address. Ray writes it when the head is up."""


@dataclass(frozen=True)
class UpResult:
    """Result of `up`. Its `str()` is the text for the user: how to reach the cluster."""

    cluster: Cluster
    started: bool
    """Whether this call started the cluster; False if it was up already."""

    def __str__(self) -> str:
        cluster = self.cluster
        # A token in the shell's environment would override the file that the cluster was started with.
        unset = ["unset RAY_AUTH_TOKEN"] if "RAY_AUTH_TOKEN" in os.environ else []
        lines = [
            f"A Ray cluster {'is' if self.started else 'was already'} up: {cluster.dashboard_url}",
            "To submit jobs to it from a shell:",
            *unset,
            f"export RAY_API_SERVER_ADDRESS={cluster.dashboard_url}",
            f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(cluster.token_path))}",
            "ray job submit --working-dir . -- python -m app train configs/income.yaml",
        ]
        return "\n".join(lines)


def up() -> UpResult:
    """Start a head on loopback with token authentication, and wait until it accepts jobs.

    Raises UserError if another version of Ray or Optuna is installed, or the head does not start.
    """
    require_tested_versions()
    with _lock():
        cluster = read_record()
        if cluster and cluster.alive():
            return UpResult(cluster, started=False)
        if cluster:
            _remove(cluster)
        owned = create_directory()
        try:
            cluster = _start(owned)
        except BaseException:
            owned.destroy()
            raise
        owned.hand_over()
        return UpResult(cluster, started=True)


def down() -> Cluster | None:
    """Stop the cluster of this state directory and everything that runs on it, but no other cluster.

    Returns the stopped cluster, or None if none was up.
    """
    with _lock():
        cluster = read_record()
        if cluster is None:
            return None
        alive = cluster.alive()
        if alive:
            head = psutil.Process(cluster.pid)
            head.terminate()
            psutil.wait_procs([head], timeout=STOP_TIMEOUT_S)
        _remove(cluster)
        return cluster if alive else None


def _start(owned: OwnedDirectory) -> Cluster:
    """Start a head that owns the cluster together with this process, and record it."""
    directory = owned.path
    log = home() / "logs" / "cluster.log"
    make_private(log.parent)
    token_path = ensure_token()
    dashboard_port, client_port = free_ports(2)
    # With an application deployed, Ray would wait 30 s for a drain, but one node cannot drain to another.
    env = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"} | local_environment(directory)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        *(
            ray,
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={temp_dir(directory)}",
        ),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        # 0: any free port, so that several Rays can run on this machine. Ray's client server cannot choose a
        # free port, and starts whenever grpc is installed.
        *("--port=0", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
        f"--ray-client-server-port={client_port}",
    ]
    os.set_inheritable(owned.lock, True)
    # Not subprocess: a Popen object warns when its process outlives it.
    pid = os.posix_spawn(
        ray,
        command,
        env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    cluster = Cluster(
        address="",
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
        pid=pid,
        created_s=psutil.Process(pid).create_time(),
        token_path=str(token_path),
        directory=str(directory),
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _accepts_jobs(cluster):
        if not cluster.alive() or time.monotonic() > deadline:
            raise UserError(f"Ray must start within {START_TIMEOUT_S:.0f} s, but did not; see {log}")
        time.sleep(0.1)
    cluster = replace(cluster, address=(temp_dir(directory) / ADDRESS_FILE).read_text().strip())
    files.write(home() / "cluster.json", json.dumps(asdict(cluster), indent=2), mode=0o600)
    return cluster


def _accepts_jobs(cluster: Cluster) -> bool:
    """Whether the head is up and its Jobs API answers."""
    if not (temp_dir(Path(cluster.directory)) / ADDRESS_FILE).exists():
        return False
    token = Path(cluster.token_path).read_text()
    try:
        # trust_env=False: a proxy from the environment must not be used for loopback.
        with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {token}"}) as client:
            return client.get(f"{cluster.dashboard_url}/api/jobs/").status_code == 200
    except httpx.TransportError:
        return False


def _remove(cluster: Cluster) -> None:
    """Kill the cluster's remaining processes, and remove its directory and its record."""
    reap(Path(cluster.directory))
    (home() / "cluster.json").unlink()


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """Let one `up` or `down` at a time change the cluster of this state directory."""
    make_private(home())
    with (home() / "cluster.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
