"""Every environment flag that Ray is started with, each with its reason."""

import hashlib
import hmac
import os
import sys
from pathlib import Path

from app.state.home import SECRET, home

SQLITE = "sqlite:///"

FLAGS = {
    # Ray runs its workers at nice 15, so anything else on the machine starves training and serving.
    "RAY_worker_niceness": "0",
    # Nothing is reported to Ray's or MLflow's makers.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A pickle is a program: no model from disk or net may bring one. MLflow allows it by default.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # Bars that redraw themselves fill the log of a job with one line for each redraw.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # The end of a training, or of a rank, is seen at the controller's next poll, every 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A rank that answers no poll for so long is replaced; 10 minutes by default.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "45",
    # An elastic group that finds no place, because somebody was faster, counts anew; after 60 s by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # How often it is asked whether a node is about to be taken away; 5 s by default.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # `ray job stop` kills what has not ended after so long; 3 s by default, too short for a checkpoint.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # HAProxy in front of the replicas instead of Serve's Python proxy, and no thread hop for user code:
    # about eight times the requests a second on two cores.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Lines of a replica's log are written at once; the flag above has 1,000 of them wait.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # HAProxy's manager would make metrics of each request, in Python, for a fifth of a core; ours are told
    # together, by the replicas.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # One thread carries more than the replicas of a small node answer; the default 4 take their cores.
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # A replica that dies with a request in hand closes the connection without an answer; ask another one.
    # A request may then run twice, so what an endpoint writes has to be idempotent.
    # One that does not fit HAProxy's buffer (16 KB) is not repeated: the client gets 502 or, if it is not the
    # first of its connection, has the connection closed.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "4",
    # HAProxy that has died is replaced after three failed checks, with one every 10 s by default.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A replica that is to stop goes on answering for so long, until HAProxy knows of it; 30 s by default.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # HAProxy's manager imports Serve and starts HAProxy, which takes seconds on a busy machine. If it is not
    # ready by then, Serve kills it, and `serve` fails; 5 s by default.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # Strips the client headers that steer Serve and limits bodies, before Serve reads either.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.serving.ingress.middlewares",
}

LOCAL_FLAGS = {
    # Read on Linux too: "0" makes 127.0.0.1 the node's address, so that Ray's own ports (control store,
    # raylet, workers, agents) listen on loopback alone, and a change of network does not break the cluster.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's processes retitle themselves over their environment, where `reap` looks for the mark.
    "SPT_NOENV": "1",
}


def environment() -> dict[str, str]:
    """The environment for Ray's processes: ours, completed by FLAGS. What the user has set wins, except that
    authentication is always by the token in the state directory, and paths are made absolute: the processes
    have other working directories."""
    # RAY_AUTH_TOKEN would shadow the file.
    ours = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    if (store := ours.get("RAYLWAY_STORE")) and "://" not in store:
        ours["RAYLWAY_STORE"] = _absolute(store)
    if (url := ours.get("RAYLWAY_DATABASE_URL", "")).startswith(SQLITE):
        ours["RAYLWAY_DATABASE_URL"] = SQLITE + _absolute(url.removeprefix(SQLITE))
    root = str(Path(__file__).resolve().parents[2])
    fixed = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home() / "auth_token"),
        "RAYLWAY_HOME": str(home()),
        # HAProxy, with what Serve's configuration of it leaves out: see app.serving.front.
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).parent / "raylway-haproxy"),
        # A job's `python -m app` has to be this Python, and Serve's own actors have to find the callback
        # above. A job's working directory comes before PYTHONPATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    return FLAGS | ours | fixed


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def node_environment() -> dict[str, str]:
    """`environment()` for a node of a cluster of several: all of them have the same SECRET, because they have
    the same token. Raises FileNotFoundError if there is none."""
    values = environment()
    token = Path(values["RAY_AUTH_TOKEN_PATH"]).read_bytes().strip()
    return {SECRET: hmac.new(token, SECRET.encode(), hashlib.sha256).hexdigest()} | values
