"""Putting endpoints on the cluster and taking them off again. Call these inside `app.cluster.session()`.

Ray Serve reads its flags when it is imported, so it is imported in here only when something is called.
"""

import socket
import time
from collections.abc import Mapping

import httpx

from app.config import Serving
from app.errors import UserError
from app.serving.endpoint import ROOT, Endpoint, Root
from app.serving.ingress import MAX_BODY_BYTES
from app.serving.variants import Deployed, common_schema, load

HOST = "127.0.0.1"
MAX_ONGOING_REQUESTS = 100
"""Requests that a replica has in hand at once; more wait. Far above what the autoscaler aims at, so that
a burst is taken in while new replicas start."""
HEALTH_CHECK_PERIOD_S = 5.0
METRICS = {"metrics_interval_s": 1.0, "look_back_period_s": 5.0}
"""How often a replica tells the autoscaler its load, and over which time it averages. Serve's 10 s and 30 s
would outweigh the delays in the project file. (Ray deprecates the first for environment variables that
nothing reads in 2.60.)"""
READY_TIMEOUT_S = 60.0
"""For HAProxy to learn of replicas that run; about 1 s when idle."""


def deploy(serving: Serving, name: str, variants: Mapping[str, Deployed]) -> str:
    """Serve these variants of a registered model, replacing what its endpoint served; wait until it answers.

    :param variants: by name; their weights, not those of `serving.variants`, are what counts.
    :returns: the server's URL; the endpoint is below it at `/v2/models/<name>`.
    :raises UserError: the port is taken, a bundle is broken, the variants take different inputs, or Serve
        could not start the replicas.
    """
    from ray import serve

    if serving.max_body_bytes > MAX_BODY_BYTES:
        raise UserError(f"serving.max_body_bytes must be at most {MAX_BODY_BYTES:,}")
    # Said here in one line; said by a replica it would be a traceback in Serve's log.
    common_schema({variant: bundle.schema for variant, bundle in load(variants).items()})
    _start(serving.port)
    endpoint = serve.deployment(Endpoint).options(
        name=name,
        ray_actor_options={"num_cpus": serving.num_cpus},
        autoscaling_config=serving.autoscaling.model_dump() | METRICS,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # A new replica starts before an old one stops, so one that cannot start takes nothing down.
        max_surge_percent=25,
    )
    bound = endpoint.bind(
        name,
        dict(variants),
        salt=serving.salt,
        max_rows=serving.max_rows,
        max_body_bytes=serving.max_body_bytes,
    )
    if ROOT not in serve.status().applications:
        root = serve.deployment(Root).options(name=ROOT, ray_actor_options={"num_cpus": 0})
        serve.run(root.bind(), name=ROOT, route_prefix="/")
    try:
        serve.run(bound, name=name, route_prefix=f"/v2/models/{name}")
    except RuntimeError as error:
        # Serve's own error names no reason; the status ends in the replica's.
        message = serve.status().applications[name].deployments[name].message
        raise UserError(
            f"Ray Serve could not start the endpoint {name}: {message.strip().splitlines()[-1]}. "
            "What it served before goes on."
        ) from error
    url = f"http://{HOST}:{serving.port}"
    _wait(url, name)
    return url


def undeploy() -> None:
    """Take all endpoints off the cluster, and Serve with them. Nothing happens if there are none."""
    from ray import serve

    serve.shutdown()


def _start(port: int) -> None:
    """Serve's controller and HAProxy, on the loopback interface. Serve may already run, on the same port."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _require_free(port)
        serve.start(http_options={"host": HOST, "port": port})
    elif client.http_config.port != port:
        raise UserError(
            f"serving.port is {port}, but this cluster already serves on port {client.http_config.port}, and "
            "can on one only. Change serving.port, or take the other endpoints off first."
        )


def _require_free(port: int) -> None:
    """HAProxy would share a taken port with whoever has it instead of failing."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} must be free on {HOST} for the endpoint ({error.strerror}). Stop what uses it, "
                "or choose another with serving.port."
            ) from error


def _wait(url: str, name: str) -> None:
    paths = ("/v2/health/live", f"/v2/models/{name}/ready")
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=url, trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                if all(client.get(path).status_code == 200 for path in paths):
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
    raise UserError(f"{url}{paths[1]} did not answer within {READY_TIMEOUT_S:g} s; see Ray Serve's logs")
