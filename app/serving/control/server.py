"""The server that all endpoints of a cluster are behind: Ray Serve's controller, HAProxy, the deployment for
what concerns no model, and the server for gRPC.

Ray Serve reads its flags when it is imported, so it is imported in here only when something is called.
"""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

from app.config.serving import Tls
from app.errors import UserError
from app.serving.control.applications import deployment, run
from app.serving.control.root import Root
from app.serving.gateway import preflight, settings
from app.serving.gateway.frontend import Frontend, Gateway
from app.serving.gateway.grpc import GrpcServer
from app.serving.names import ROOT
from app.serving.protocols import docs_page

LOOPBACK = "127.0.0.1"
GRPC = "Grpc"
"""The application of the server for gRPC; a model's name has no capital."""
STOP_TIMEOUT_S = 180.0
"""For Ray Serve to shut down; a few seconds when idle."""
RELOAD_TIMEOUT_S = 60.0
"""Limit for HAProxy to reload with changed settings; takes under 1 s on an idle machine."""
RETRY_S = 0.5
"""Pause before HAProxy, which has died, is asked again."""


def open_frontend(wanted: Gateway) -> None:
    """Have HAProxy and the server for gRPC go by `wanted`; start them if they do not run.

    A renewed certificate is taken in, too. Raises UserError if they cannot; what was before then goes on.
    """
    before = settings.read()
    try:
        with settings.applied(wanted):
            _start(wanted.frontend)
            _start_grpc(wanted, before)
    except BaseException:
        with contextlib.suppress(UserError):
            _reload()
        raise


def runs() -> bool:
    """Whether Ray Serve runs on the cluster, with or without an endpoint."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def stop() -> None:
    """Shut Ray Serve down, with all that runs on it. Raises UserError if it does not end."""
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    serve.shutdown()
    # Serve itself waits for 30 s only, and would then take down what is started next.
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
    raise UserError(f"Ray Serve must shut down within {STOP_TIMEOUT_S:g} s, and did not; see its logs")


def start_root(secured: bool) -> None:
    """The deployment that answers for the server; if `secured`, it names no model."""
    version = [secured, docs_page.page().decode()]
    root = deployment(Root, ROOT, version, ray_actor_options={"num_cpus": 0})
    run(root.bind(secured), ROOT, ROOT, "/")


def num_nodes() -> int:
    """Nodes of the cluster that are alive."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _start(front: Frontend) -> None:
    """Serve's controller and HAProxy; if they run, HAProxy reads its settings again."""
    from ray import serve

    if runs():
        _reload()
        return
    preflight.require_free_port(front.host, front.port, "serving.port")
    # Replicas listen for HAProxy, which may be on another node.
    host = LOOPBACK if num_nodes() == 1 else "0.0.0.0"
    serve.start(http_options={"host": host, "port": front.port})


def _reload() -> None:
    """Have HAProxy on every node read its settings again; Serve does so only if replicas come or go."""
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
            # It says so what is wrong with its settings. Without, it has died, and Serve starts another.
            refused = re.search(r"\[ALERT\].*", str(error))
            if refused is None and time.monotonic() < deadline:
                time.sleep(RETRY_S)
                continue
            reason = refused[0] if refused else "it does not run; see Ray Serve's logs"
            raise UserError(
                f"HAProxy does not take in serving.host, serving.port or serving.tls: {reason}"
            ) from None


def _start_grpc(wanted: Gateway, before: Gateway | None) -> None:
    """The server for gRPC, where there is to be one; the one of `before` goes on if it cannot start."""
    from ray import serve

    runs = GRPC in serve.status().applications
    front = wanted.frontend
    if front.grpc_port is None:
        if runs:
            serve.delete(GRPC)
        return
    if not runs or before is None or before.frontend.grpc_port != front.grpc_port:
        preflight.require_free_port(front.host, front.grpc_port, "serving.grpc_port")
    try:
        run(_grpc(wanted), GRPC, GRPC, None)
    except UserError:
        if runs and before is not None and before.frontend.grpc_port is not None:
            run(_grpc(before), GRPC, GRPC, None)
        else:
            serve.delete(GRPC)
        raise


def _grpc(wanted: Gateway) -> Any:
    front, endpoints = wanted.frontend, wanted.backends.values()
    issuers = {each.issuer for each in endpoints}
    taken = [] if None in issuers else sorted((each for each in issuers if each), key=repr)
    max_message_bytes = max(each.max_body_bytes for each in endpoints)
    made_of = [[each.model_dump() for each in taken], max_message_bytes]
    tls = None
    contents = []
    if front.certificate and front.key:
        tls = Tls(certificate=front.certificate, key=front.key)
        contents = [Path(file).read_text() for file in (front.certificate, front.key)]
    server = deployment(
        GrpcServer,
        GRPC,
        [front.host, front.grpc_port, front.url, contents, *made_of],
        ray_actor_options={"num_cpus": 0},
        # The one before must have left the port.
        max_surge_percent=0,
    )
    return server.bind(front.host, front.grpc_port, front.url, tls, taken, max_message_bytes)
