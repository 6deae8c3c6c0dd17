"""The environment variables that Ray's processes are started with, each with its reason."""

import hashlib
import hmac
import os
import sys
from pathlib import Path

from app.state.home import GATEWAY_SECRET_VARIABLE, home

SQLITE = "sqlite:///"
"""Start of the URL of a SQLite file."""

FLAGS = {
    # Ray runs its workers at nice 15, so anything else on the machine slows training and serving down.
    "RAY_worker_niceness": "0",
    # No usage reports to Ray's or MLflow's makers.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Loading a pickle runs code: no model file may contain one. MLflow allows it by default.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # A progress bar adds one line to a job's log at each redraw.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Interval at which Train's controller polls the ranks, and notices that one or all have ended; default 2
    # s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A rank that answers no poll for this long is replaced; default 10 minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "45",
    # An elastic group that finds no room, because another command took it, is resized after this time;
    # default 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # Interval at which Train checks whether a node is about to be preempted; default 5 s.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # `ray job stop` kills a job that still runs after this time; default 3 s, too short to write a
    # checkpoint.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # HAProxy in front of the replicas instead of Serve's Python proxy, and user code in the server's own
    # thread: about eight times as many requests per second on two cores.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Write each line of a replica's log at once; the flag above buffers 1,000 of them.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # HAProxy's manager would compute metrics for each request in Python, which takes a fifth of a core. The
    # replicas report their own in batches.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # One HAProxy thread serves more requests than a small node's replicas answer; the default 4 take their
    # cores.
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # A replica that dies during a request closes the connection without an answer: retry on another replica.
    # A request may then run twice, so all that an endpoint writes must be idempotent. A request larger than
    # HAProxy's buffer (16 KB) is not retried: the client gets 502, or a closed connection if the request is
    # not the first on its connection.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "4",
    # HAProxy is replaced after three failed health checks, one per period; default 10 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A replica that is being stopped keeps answering for this long, until HAProxy has removed it; default 30
    # s.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # HAProxy's manager imports Serve and starts HAProxy, which takes seconds on a busy machine. If it is not
    # ready within this time, Serve kills it, and `raylway serve` fails; default 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # Removes client headers that control Serve, and limits bodies, before Serve reads either.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.serving.gateway.guard.middlewares",
}
"""Variables for every cluster. The user's environment overrides them."""

LOCAL_FLAGS = {
    # Read on Linux too: "0" makes 127.0.0.1 the node's address, so that Ray's own ports (control store,
    # raylet, workers, agents) listen on loopback only, and a change of network does not break the cluster.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's processes overwrite their environment with their title, and `guardian.reap` reads the mark there.
    "SPT_NOENV": "1",
}
"""More variables for a cluster of one node on this machine."""


def environment() -> dict[str, str]:
    """The environment for Ray's processes: that of this process, completed by FLAGS.

    The user's values override FLAGS, but not the authentication, which always uses the token file of the
    state directory, nor the paths of programs and modules. Paths are made absolute, because Ray's processes
    have other working directories.
    """
    # RAY_AUTH_TOKEN would override the token file.
    user = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    if (store := user.get("RAYLWAY_STORE")) and "://" not in store:
        user["RAYLWAY_STORE"] = _absolute(store)
    if (url := user.get("RAYLWAY_DATABASE_URL", "")).startswith(SQLITE):
        user["RAYLWAY_DATABASE_URL"] = SQLITE + _absolute(url.removeprefix(SQLITE))
    root = str(Path(__file__).resolve().parents[2])
    fixed = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home() / "auth_token"),
        "RAYLWAY_HOME": str(home()),
        # Starts HAProxy with an edited configuration, see app.serving.gateway.haproxy.
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).parent / "raylway-haproxy"),
        # `python -m app` in a job must be this Python, and Serve's own actors must find the callback in
        # FLAGS. A job's working directory comes before PYTHONPATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    return FLAGS | user | fixed


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def node_environment() -> dict[str, str]:
    """`environment()` for a node of a cluster of several nodes.

    The gateway's secret is derived from the token, which all nodes have, so that it is the same on all of
    them. Raises FileNotFoundError if there is no token file.
    """
    values = environment()
    token = Path(values["RAY_AUTH_TOKEN_PATH"]).read_bytes().strip()
    secret = hmac.new(token, GATEWAY_SECRET_VARIABLE.encode(), hashlib.sha256).hexdigest()
    return {GATEWAY_SECRET_VARIABLE: secret} | values
