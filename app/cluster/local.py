"""`up` and `down`: a Ray cluster on this machine that outlives the command which started it."""

import contextlib
import fcntl
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from app.cluster.guardian import Held, hold, reap
from app.cluster.ports import free_ports
from app.cluster.record import Cluster, recorded
from app.cluster.session import ensure_token, local_environment, temp_dir
from app.errors import UserError
from app.state.home import home, make_private

START_TIMEOUT_S = 90.0
"""A head takes about 7 s on two idle cores."""
STOP_TIMEOUT_S = 15.0
"""How long the head may take to stop its processes before they are killed; about 4 s when idle."""


@dataclass(frozen=True)
class Up:
    """What `up` found or made; `str()` of it tells the user how to reach the cluster."""

    cluster: Cluster
    started: bool
    """False when it was up already."""

    def __str__(self) -> str:
        cluster = self.cluster
        # A token in the shell's environment would win over the file that the cluster was started with.
        unset = ["unset RAY_AUTH_TOKEN"] if "RAY_AUTH_TOKEN" in os.environ else []
        lines = [
            f"A Ray cluster {'is' if self.started else 'was already'} up: {cluster.dashboard_url}",
            "To send it jobs from a shell:",
            *unset,
            f"export RAY_API_SERVER_ADDRESS={cluster.dashboard_url}",
            f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(cluster.token_path))}",
            "ray job submit --working-dir . -- python -m app train configs/income.yaml",
        ]
        return "\n".join(lines)


def up() -> Up:
    """Start a head on loopback, with token authentication, and wait until it takes jobs.

    :raises UserError: it did not come up; names the log file.
    """
    with _lock():
        cluster = recorded()
        if cluster and cluster.alive():
            return Up(cluster, started=False)
        if cluster:
            _forget(cluster)
        held = hold()
        try:
            cluster = _start(held)
        except BaseException:
            held.end()
            raise
        held.hand_over()
        return Up(cluster, started=True)


def down() -> Cluster | None:
    """Stop the cluster of this state directory and everything that runs on it; no other.

    Returns what was stopped, or None when nothing was up.
    """
    with _lock():
        cluster = recorded()
        if cluster is None:
            return None
        alive = cluster.alive()
        if alive:
            head = psutil.Process(cluster.pid)
            head.terminate()
            psutil.wait_procs([head], timeout=STOP_TIMEOUT_S)
        _forget(cluster)
        return cluster if alive else None


def _start(held: Held) -> Cluster:
    """A head that holds the cluster beside this process."""
    directory = held.directory
    log = home() / "logs" / "cluster.log"
    make_private(log.parent)
    token_path = ensure_token()
    dashboard_port, client_port = free_ports(2)
    # On one node there is nowhere to drain to; with an application deployed, Ray would wait 30 s for it.
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
        # 0: any free port, so that a second Ray on this machine is no problem. Ray's client server cannot
        # choose its own, and starts whenever grpc is installed.
        *("--port=0", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
        f"--ray-client-server-port={client_port}",
    ]
    os.set_inheritable(held.lock, True)
    # Not subprocess: its objects expect to see the end of what they started.
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
    while not _takes_jobs(cluster):
        if not cluster.alive() or time.monotonic() > deadline:
            raise UserError(f"Ray must start, within {START_TIMEOUT_S:.0f} s, and did not. See {log}")
        time.sleep(0.1)
    # Ray writes its address here once the head stands.
    address = (temp_dir(directory) / "ray_current_cluster").read_text().strip()
    cluster = Cluster(**asdict(cluster) | {"address": address})
    _record(cluster)
    return cluster


def _takes_jobs(cluster: Cluster) -> bool:
    if not (temp_dir(Path(cluster.directory)) / "ray_current_cluster").exists():
        return False
    token = Path(cluster.token_path).read_text()
    try:
        # trust_env off: a proxy in the environment is not for loopback.
        with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {token}"}) as client:
            return client.get(f"{cluster.dashboard_url}/api/jobs/").status_code == 200
    except httpx.TransportError:
        return False


def _record(cluster: Cluster) -> None:
    descriptor, name = tempfile.mkstemp(dir=home())  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(cluster), file, indent=2)
    Path(name).replace(home() / "cluster.json")


def _forget(cluster: Cluster) -> None:
    reap(Path(cluster.directory))
    (home() / "cluster.json").unlink()


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One `up` or `down` at a time for one state directory."""
    make_private(home())
    with (home() / "cluster.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
