"""Connects a command to Ray: to the cluster that is up, or to one that is started for this command only.

`python -m app.cluster.session COMMAND...` runs a command, such as `ray start`, in the environment that every
Ray process of Raylway has. The nodes of cluster.yaml start that way, so flags.py is the only list of flags.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.cluster.flags import FLAGS, LOCAL_FLAGS, environment, node_environment
from app.cluster.guardian import MARK, create_directory
from app.cluster.ports import free_block, free_ports
from app.cluster.record import read_record
from app.cluster.requirements import require_tested_versions
from app.errors import UserError
from app.state.home import GATEWAY_FOLDER_VARIABLE, GATEWAY_SECRET_VARIABLE, home, make_private

NUM_REPLICA_PORTS = 500
"""Number of ports for the replicas of one local cluster."""
PROBE_INTERVAL_S = 3.0
"""Time between two checks that the cluster still answers."""
MAX_FAILED_PROBES, MAX_FAILED_REMOTE_PROBES = 3, 15
"""Consecutive failed checks after which a cluster counts as ended: on this machine, and on another one. A
remote head may restart, and Ray's commands survive that for a minute."""

SET_BY_RAY = ("PYTHONBREAKPOINT",)
"""Environment variables that `ray.init` sets in this process and leaves behind."""


def local_environment(directory: Path) -> dict[str, str]:
    """`environment()` for a local cluster of one node, whose files are in `directory`.

    HAProxy's admin socket is writable by everyone, so it is in a directory that only its owner can enter.
    HAProxy's ports are free ones: it shares a port that is in use instead of failing. The replicas' ports
    belong to this cluster alone, so that two clusters on one machine never reach each other's replicas.
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
        GATEWAY_SECRET_VARIABLE: secrets.token_hex(32),
    }
    return LOCAL_FLAGS | environment() | serve | _locations(directory) | {MARK: str(directory)}


def _locations(directory: Path) -> dict[str, str]:
    """Variables by which the processes of a local cluster, and commands that join it, find its files."""
    return {"RAY_TMPDIR": str(directory), GATEWAY_FOLDER_VARIABLE: str(directory)}


def temp_dir(directory: Path) -> Path:
    """Ray's own directory inside the directory of a local cluster.

    Ray's processes find their cluster by RAY_TMPDIR/ray. Without it they would look in /tmp/ray, which
    another cluster may own; Ray Train's cleanup process, for example, waits 10 s for a cluster that has
    ended.
    """
    return directory / "ray"


def ensure_token() -> Path:
    """Create the token file of the state directory if it does not exist; only its owner can read it."""
    path = home() / "auth_token"
    make_private(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        os.write(descriptor, secrets.token_hex(32).encode())
        # A link appears with its whole content and never replaces a file: of two commands that start at the
        # same time, one token wins.
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.close(descriptor)
        Path(name).unlink()
    path.chmod(0o600)
    return path


def joins_lasting_cluster() -> bool:
    """Whether `session` joins a cluster that continues after the command has ended."""
    cluster = read_record()
    return os.environ.get("RAY_ADDRESS", "local") != "local" or bool(cluster and cluster.alive())


@contextlib.contextmanager
def session(*, log_to_driver: bool = True) -> Iterator[None]:
    """Connect to Ray for one command: join a running cluster, or start one and stop it at the end.

    Order of choice: the Ray that this process already uses; RAY_ADDRESS, which Ray sets in a job; the cluster
    that `raylway up` started for this state directory; a new local one. Another cluster that happens to run
    on the machine is never joined.

    Serve reads its flags when `ray.serve` is first imported: import it inside the session.

    :param log_to_driver: print the workers' output in this process.
    :raises UserError: another version of Ray or Optuna is installed; the cluster to join does not answer or
        refuses the token; the cluster ended before the command.
    """
    require_tested_versions()
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    cluster = read_record()
    lost = threading.Event()
    with contextlib.ExitStack() as stack:
        directory = None
        if address != "local":
            # Not a cluster of `raylway up`: its authentication comes from the user's environment.
            stack.enter_context(_environ(FLAGS | dict(os.environ) | {"RAYLWAY_HOME": str(home())}))
        elif cluster and cluster.alive():
            address = cluster.address
            locations = _locations(Path(cluster.directory))
            stack.enter_context(_environ(LOCAL_FLAGS | environment() | locations))
        else:
            ensure_token()
            owned = create_directory()
            stack.callback(owned.destroy)
            directory = owned.path
            stack.enter_context(_environ(local_environment(directory)))
        stack.callback(_update_environ, {name: os.environ.get(name) for name in SET_BY_RAY})
        stack.callback(_disconnect, lost)
        _connect(address, directory, log_to_driver)
        if directory:
            # The mark is for Ray's processes only: other processes of the command may outlive the cluster.
            del os.environ[MARK]
        if "://" not in address:  # Ray's client watches the cluster itself
            stack.enter_context(_watching(_gcs_address(), lost))
        yield


def _disconnect(lost: threading.Event) -> None:
    """Leave the cluster, unless it ended (`lost` is set) and there is nothing left to leave."""
    _silence_serve()
    if "ray" in sys.modules and not lost.is_set():
        sys.modules["ray"].shutdown()


def _silence_serve() -> None:
    """Stop Serve's polling thread in this process from reconnecting. Call this before `ray.shutdown()`.

    The thread keeps polling the controller. Its next call would print a traceback, and Ray would start or
    join another cluster for it.
    """
    router: Any = sys.modules.get("ray.serve._private.router")
    if router:
        auto_init: Any = sys.modules["ray._private.auto_init_hook"]
        auto_init.enable_auto_connect = False
        if loop := router.SingletonThreadRouter._asyncio_loop:
            loop.set_exception_handler(lambda *_: None)
        # A later session needs a new polling client.
        router.SharedRouterLongPollClient.get_or_create.cache_clear()


def _gcs_address() -> str:
    return str(sys.modules["ray"].get_runtime_context().gcs_address)


@contextlib.contextmanager
def _watching(address: str, lost: threading.Event) -> Iterator[None]:
    """Watch the control store at `address`: if it stops answering, set `lost`, interrupt the main thread and
    raise UserError at the end of the block.

    Ray itself would end the process after a minute, without a message.
    """
    host, _, port = address.rpartition(":")
    is_local = host == "localhost" or host.startswith("127.")
    max_failed = MAX_FAILED_PROBES if is_local else MAX_FAILED_REMOTE_PROBES
    ended = threading.Event()

    def probe() -> None:
        failed, probe_s = 0, 0.0
        while failed < max_failed:
            # To a host that is gone, a connection is not refused: the probe itself takes PROBE_INTERVAL_S.
            if ended.wait(max(0.0, PROBE_INTERVAL_S - probe_s)):
                return
            started = time.monotonic()
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_INTERVAL_S).close()
                failed = 0
            except OSError:
                failed += 1
            probe_s = time.monotonic() - started
        if ended.is_set():
            return
        lost.set()
        # A script's background command ignores SIGINT.
        number = signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    threading.Thread(target=probe, name="cluster", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if lost.is_set():
            raise UserError(
                f"the Ray cluster at {address} must run until the command ends, but it no longer answers; "
                "start it again (`raylway up`), and run the command again: completed work is kept"
            )


@contextlib.contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    """Make `values` the environment of this process for the time of the block.

    Only variables that differ are set or deleted, and only those that still have the block's value are
    restored, because other threads, such as a notebook's, may read and change the environment meanwhile.
    """
    previous = dict(os.environ)
    names = {*previous, *values}
    changes = {name: values.get(name) for name in names if values.get(name) != previous.get(name)}
    _update_environ(changes)
    try:
        yield
    finally:
        unchanged = [name for name, value in changes.items() if os.environ.get(name) == value]
        _update_environ({name: previous.get(name) for name in unchanged})


def _update_environ(changes: Mapping[str, str | None]) -> None:
    """Set variables, and delete those whose value is None."""
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keep the command's SIGTERM handler. Ray's ends the process without a message, with exit code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(address: str, directory: Path | None, log_to_driver: bool) -> None:
    """Join the cluster at `address`, or start one whose files are in `directory`.

    Raises UserError if the cluster does not answer or refuses the token.
    """
    import ray
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config

    # Ray reads these settings at import, and may have been imported before the environment was set.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(name, True)
    # The dashboard takes seconds to start, and a cluster of one command does not need it.
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
            f"A Ray cluster must answer at {address} (RAY_ADDRESS, or the one of `raylway up`), "
            f"but: {error}. Check the address and the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)."
        ) from error


def main() -> None:
    """Replace this process by the command in its arguments, which runs in `node_environment()`."""
    try:
        require_tested_versions()
    except UserError as error:
        sys.exit(f"error: {error}")
    os.execvpe(sys.argv[1], sys.argv[1:], node_environment())


if __name__ == "__main__":
    main()
