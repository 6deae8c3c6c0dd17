"""How Ray is started and joined: the cluster there is, or one for a single command.

`python -m app.cluster.session COMMAND...` runs a command, such as `ray start`, with these flags: the nodes of
cluster.yaml start that way, so the flags are written down once.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.cluster.flags import FLAGS, LOCAL_FLAGS, environment, node_environment
from app.cluster.guardian import MARK, hold
from app.cluster.ports import free_block, free_ports
from app.cluster.record import recorded
from app.errors import UserError
from app.state.home import FRONT, SECRET, home, make_private

NUM_REPLICA_PORTS = 500
"""Ports for the replicas of one local cluster."""
LOOK_S = 3.0
"""How often a command looks whether its cluster is there."""
LOST_AFTER, REMOTE_LOST_AFTER = 3, 15
"""Looks in a row that find none, until a cluster on this machine counts as ended, and one elsewhere: its head
may be started anew, which Ray's commands outlive for a minute."""


def local_environment(directory: Path) -> dict[str, str]:
    """`environment()` for a one-node cluster of its own, whose files are below `directory`.

    HAProxy's admin socket is open to everyone by its own mode, so it goes where only we can enter; its ports
    are free ones, because HAProxy shares a taken port with whoever has it instead of failing. Replicas have
    ports of this cluster alone, so that two clusters on a machine do not meet.
    """
    stats_port, metrics_port, fallback_port = free_ports(3)
    replica_port = free_block(NUM_REPLICA_PORTS)
    serve = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_port + NUM_REPLICA_PORTS - 1),
        SECRET: secrets.token_hex(32),
    }
    return LOCAL_FLAGS | environment() | serve | _places(directory) | {MARK: str(directory)}


def _places(directory: Path) -> dict[str, str]:
    """Where a local cluster's processes and the commands that join it find what is the cluster's alone."""
    return {"RAY_TMPDIR": str(directory), FRONT: str(directory)}


def temp_dir(directory: Path) -> Path:
    """Ray's own part of a local cluster's directory.

    It is where RAY_TMPDIR leads Ray's processes, so that they find their cluster there and not the one that
    /tmp/ray happens to name: Train's cleaner, for one, waits 10 s for a cluster that is gone.
    """
    return directory / "ray"


def ensure_token() -> Path:
    """The state directory's token file, made once, readable by its owner only."""
    path = home() / "auth_token"
    make_private(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        os.write(descriptor, secrets.token_hex(32).encode())
        # A link appears whole and never replaces: of two commands that begin together, one token wins.
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.close(descriptor)
        Path(name).unlink()
    path.chmod(0o600)
    return path


def lasts() -> bool:
    """Whether `session` joins a cluster that goes on when the command has ended."""
    cluster = recorded()
    return os.environ.get("RAY_ADDRESS", "local") != "local" or bool(cluster and cluster.alive())


@contextlib.contextmanager
def session(*, log_to_driver: bool = True) -> Iterator[None]:
    """Ray for one command: joined where there is one for us, started and stopped again where there is none.

    In order: the Ray this process already uses; RAY_ADDRESS, which Ray sets in a job; the cluster that `up`
    started for this state directory; a local one. Never another cluster that happens to run on the machine.

    Serve reads its flags when `ray.serve` is first imported: import it inside the session.

    :param log_to_driver: show what the workers print.
    :raises UserError: the cluster to join does not answer or refuses our token; it ended before the command.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    before = dict(os.environ)
    address = os.environ.get("RAY_ADDRESS", "local")
    cluster = recorded()
    held = directory = None
    lost = threading.Event()
    try:
        if address != "local":
            # Someone else's cluster: its own authentication, read from the user's environment.
            os.environ.update(FLAGS | before | {"RAYLWAY_HOME": str(home())})
        elif cluster and cluster.alive():
            address = cluster.address
            _replace_environ(LOCAL_FLAGS | environment() | _places(Path(cluster.directory)))
        else:
            ensure_token()
            held = hold()
            directory = held.directory
            _replace_environ(local_environment(directory))
        _connect(address, directory, log_to_driver)
        if directory:
            # Only Ray's processes are the cluster's; what the command starts for itself is not.
            del os.environ[MARK]
        is_client = "://" in address  # Ray's client has a watch of its own
        with contextlib.nullcontext() if is_client else _ending_with(_gcs_address(), lost):
            yield
    finally:
        _silence_serve()
        if "ray" in sys.modules and not lost.is_set():  # there is nothing to leave any more
            sys.modules["ray"].shutdown()
        if held:
            held.end()
        _replace_environ(before)


def _silence_serve() -> None:
    """Call this before `ray.shutdown()`: a thread of Ray Serve in this process keeps polling the controller.
    It would print a traceback, and Ray would start or join a cluster for its next call.
    """
    router: Any = sys.modules.get("ray.serve._private.router")
    if router:
        hook: Any = sys.modules["ray._private.auto_init_hook"]
        hook.enable_auto_connect = False
        if loop := router.SingletonThreadRouter._asyncio_loop:
            loop.set_exception_handler(lambda *_: None)
        # Who joins again needs a new one.
        router.SharedRouterLongPollClient.get_or_create.cache_clear()


def _gcs_address() -> str:
    return str(sys.modules["ray"].get_runtime_context().gcs_address)


@contextlib.contextmanager
def _ending_with(address: str, lost: threading.Event) -> Iterator[None]:
    """Interrupt the main thread when the cluster ends, set `lost`, and raise UserError.

    Ray itself would end the process after a minute, without a word.
    """
    host, _, port = address.rpartition(":")
    is_here = host == "localhost" or host.startswith("127.")
    patience = LOST_AFTER if is_here else REMOTE_LOST_AFTER
    ended = threading.Event()

    def look() -> None:
        missed, spent_s = 0, 0.0
        while missed < patience:
            # A host that is gone refuses nothing: the look itself takes LOOK_S then.
            if ended.wait(max(0.0, LOOK_S - spent_s)):
                return
            begun = time.monotonic()
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
                missed = 0
            except OSError:
                missed += 1
            spent_s = time.monotonic() - begun
        if ended.is_set():
            return
        lost.set()
        # A command in the background of a script ignores SIGINT.
        number = signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    threading.Thread(target=look, name="cluster", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if lost.is_set():
            raise UserError(
                f"the Ray cluster at {address} must go on while a command runs, but it does not answer any "
                "more; start it again (`raylway up`), and give the command again: what is done is kept"
            )


def _replace_environ(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keep the command's own handler: Ray's ends the process without a word, and with exit code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(address: str, directory: Path | None, log_to_driver: bool) -> None:
    import ray
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config

    # Ray reads these settings once, at import; something may have imported it before us.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(name, True)
    # The dashboard costs seconds to start and nobody looks at it in a session of one command.
    local = {"include_dashboard": False, "_temp_dir": str(temp_dir(directory))} if directory else {}
    try:
        if ":" in address and "://" not in address:
            # Ray itself would wait a minute and more for a cluster that is gone.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        with _keeping_sigterm():
            ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.WARNING, **local)
        if directory:
            gcs_address = ray.get_runtime_context().gcs_address
            ray._private.utils.write_ray_address(gcs_address, str(temp_dir(directory)))
    except (OSError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"A Ray cluster must answer at {address} (RAY_ADDRESS, or the one that `up` started), "
            f"but: {error}. Check the address and the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)."
        ) from error


if __name__ == "__main__":
    _environment = node_environment()
    os.execvpe(sys.argv[1], sys.argv[1:], _environment)
