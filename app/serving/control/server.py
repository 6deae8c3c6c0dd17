"""The server of a cluster, which all its endpoints are behind: Ray Serve's controller, HAProxy, the root
deployment and the gRPC server.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
"""

import contextlib
import re
import time

from app.errors import UserError
from app.serving.control import grpc_server
from app.serving.control.applications import create_deployment, run_application
from app.serving.control.root import Root
from app.serving.gateway import preflight, settings
from app.serving.gateway.frontend import Frontend, Gateway
from app.serving.names import ROOT
from app.serving.protocols import docs_page

LOCK = "gateway"
"""Name of the lock for changes of the server: the gateway's settings, and the endpoints behind it."""
LOOPBACK = "127.0.0.1"
STOP_TIMEOUT_S = 180.0
"""Time for Ray Serve to shut down; it takes a few seconds on an idle machine."""
RELOAD_TIMEOUT_S = 60.0
"""Time for HAProxy to load changed settings; it takes less than 1 s on an idle machine."""
RETRY_S = 0.5
"""Pause before another attempt to reload, after HAProxy has died."""


def open_gateway(gateway: Gateway) -> None:
    """Let HAProxy and the gRPC server use these settings; start them if they do not run.

    A certificate that was renewed is loaded again. Raises UserError if they cannot use the settings; the
    previous ones are then restored.
    """
    previous = settings.read()
    try:
        with settings.applied(gateway):
            _start_or_reload(gateway.frontend)
            grpc_server.update(gateway, previous)
    except BaseException:
        with contextlib.suppress(UserError):
            _reload()
        raise


def is_running() -> bool:
    """Whether Ray Serve runs on the cluster, with or without an endpoint."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def stop() -> None:
    """Shut down Ray Serve with all its applications. Raises UserError if it does not end in time."""
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    serve.shutdown()
    # Serve waits for at most 30 s. A Serve that is still shutting down would stop the next applications, too.
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
    raise UserError(f"Ray Serve must shut down within {STOP_TIMEOUT_S:g} s, and has not; see its logs")


def start_root(hides_models: bool) -> None:
    """Start the root deployment, or update it. Raises UserError if Serve cannot start it."""
    inputs = [hides_models, docs_page.page().decode()]
    root = create_deployment(Root, ROOT, inputs, ray_actor_options={"num_cpus": 0})
    run_application(root.bind(hides_models), ROOT, ROOT, "/")


def num_nodes() -> int:
    """Number of nodes of the cluster that are alive."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _start_or_reload(frontend: Frontend) -> None:
    """Start Serve's controller with HAProxy; if it runs, let HAProxy load its settings again."""
    from ray import serve

    if is_running():
        _reload()
        return
    preflight.require_free_port(frontend.host, frontend.port, "serving.port")
    # The address that replicas listen on. On a cluster of several nodes, HAProxy may run on another node.
    host = LOOPBACK if num_nodes() == 1 else "0.0.0.0"
    serve.start(http_options={"host": host, "port": frontend.port})


def _reload() -> None:
    """Let HAProxy on every node load its settings again. Serve itself reloads only if replicas change.

    Raises UserError if HAProxy refuses the settings, or does not run.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    deadline = time.monotonic() + RELOAD_TIMEOUT_S
    while client is not None:
        proxies = ray.get(client._controller.get_proxies.remote())
        managers = [proxy for node, proxy in proxies.items() if not node.startswith("fallback-")]
        left_s = max(0.0, deadline - time.monotonic())
        try:
            ray.get([manager._reload_haproxy.remote() for manager in managers], timeout=left_s)
            return
        except (RayError, GetTimeoutError) as error:
            # An alert names the setting that HAProxy refuses. Without one, HAProxy has died, and Serve
            # restarts it.
            alert = re.search(r"\[ALERT\].*", str(error))
            if alert is None and time.monotonic() < deadline:
                time.sleep(RETRY_S)
                continue
            reason = alert[0] if alert else "it does not run; see Ray Serve's logs"
            raise UserError(
                f"HAProxy does not accept serving.host, serving.port or serving.tls: {reason}"
            ) from None
