"""Putting endpoints on the cluster and taking them off again. Call these inside `app.cluster.session()`.

Ray Serve reads its flags when it is imported, so it is imported in here only when something is called.
"""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from app import issuer, store
from app.audit import Audit
from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving import front, traffic
from app.serving.applications import (
    HEALTH_CHECK_PERIOD_S,
    MAX_ONGOING_REQUESTS,
    METRICS,
    code,
    digest,
    refresh,
    run,
    start_workers,
    stop_workers,
)
from app.serving.endpoint import Endpoint
from app.serving.front import MAX_BODY_BYTES
from app.serving.grpc import Grpc
from app.serving.limits import ROOT
from app.serving.root import Root
from app.serving.status import models
from app.serving.traffic import Traffic
from app.serving.variants import Deployed, common_schema, load

HOST = "127.0.0.1"
GRPC = "Grpc"
"""The application of the server for gRPC; a model's name has no capital."""
READY_TIMEOUT_S = 60.0
"""For HAProxy to learn of replicas that run; about 1 s when idle."""


def deploy(serving: Serving, name: str, wanted: Traffic, on_wait: Callable[[str], None] | None = None) -> str:
    """Serve a registered model with this traffic, instead of what its endpoint served; wait until it answers.

    Where only the traffic is another one, the replicas go on and swap it in.

    :param on_wait: told who is waited for, if somebody else is changing this endpoint.
    :returns: the server's URL; the endpoint is below it at `/v2/models/<name>`.
    :raises UserError: the port is taken, a bundle is broken, the variants take different inputs, or Serve
        could not start the replicas.
    """
    from ray import serve

    store.require_shared()
    if serving.limits.max_body_bytes > MAX_BODY_BYTES:
        raise UserError(f"serving.limits.max_body_bytes must be at most {MAX_BODY_BYTES:,}")
    # Said here in one line; said by a replica it would be a traceback in Serve's log.
    common_schema(
        {variant: bundle.schema for variant, bundle in load(wanted.variants, serving.trusted_keys).items()}
    )
    _set_front(serving, name)
    _start(serving)
    secured = serving.auth != "none"
    root = serve.deployment(Root).options(
        name=ROOT,
        version=digest([secured, code()]),
        _internal=True,  # see `_application`
        ray_actor_options={"num_cpus": 0},
    )
    run(root.bind(secured), ROOT, ROOT, "/")
    _start_grpc(serving, name)
    url = address(serving)
    with traffic.alone(name, on_wait):
        _replace(serving, name, wanted, url)
    return url


def _replace(serving: Serving, name: str, wanted: Traffic, url: str) -> None:
    """Start the replicas and workers, and let them take the traffic in. Undone if that fails."""
    from ray import serve

    is_new = name not in serve.status().applications
    with Audit() as audit:
        try:
            start_workers(name, serving, wanted)
            with traffic.tried(audit, name, wanted, serving) as entry:
                run(_application(serving, name), name, name, f"/v2/models/{name}")
                _wait(url, name)
                refresh(name, entry)
        except BaseException:
            if is_new:
                serve.delete(name)
            raise
        finally:
            stop_workers(audit, name)


def address(serving: Serving) -> str:
    """The server's URL, from this machine."""
    host = HOST if serving.host in ("0.0.0.0", "::", "localhost") else serving.host
    return f"{'https' if serving.tls else 'http'}://{host}:{serving.port}"


def _set_front(serving: Serving, name: str) -> None:
    """Raises UserError if a file for TLS is not there, or is none."""
    tls = serving.tls
    if tls:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tls.certificate, tls.key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"serving.tls must name a certificate and its key, in PEM format; {tls.certificate} and "
                f"{tls.key}: {error}"
            ) from None
    certificate, key = (Path(tls.certificate), Path(tls.key)) if tls else (None, None)
    front.write(serving.host, certificate, key, {name: serving.limits.max_wait_s})


def _start_grpc(serving: Serving, name: str) -> None:
    """The server for gRPC, where the project asks for one."""
    from ray import serve

    if serving.grpc_port is None:
        return
    tls = serving.tls
    tls_files = [Path(file).read_text() for file in (tls.certificate, tls.key)] if tls else []
    if GRPC not in serve.status().applications:
        _require_free(serving.grpc_port, "serving.grpc_port")
    endpoints = _endpoints(serving, name)
    issuers = {_issuer(each) for each in endpoints}
    taken = [] if None in issuers else sorted((each for each in issuers if each), key=repr)
    max_message_bytes = max(each.limits.max_body_bytes for each in endpoints)
    made_of = [[each.model_dump() for each in taken], max_message_bytes, tls_files, code()]
    server = serve.deployment(Grpc).options(
        name=GRPC,
        version=digest([serving.host, serving.grpc_port, address(serving), *made_of]),
        _internal=True,  # see `_application`
        ray_actor_options={"num_cpus": 0},
        # The one before must have left the port.
        max_surge_percent=0,
    )
    bound = server.bind(serving.host, serving.grpc_port, address(serving), tls, taken, max_message_bytes)
    run(bound, GRPC, GRPC, None)


def _endpoints(serving: Serving, name: str) -> list[Serving]:
    """The settings of this endpoint and of those that are deployed already."""
    from ray import serve

    found = [serving]
    with Audit() as audit:
        for other in models(serve.status().applications):
            # An entry that cannot be read is the fault of its model alone.
            with contextlib.suppress(UserError):
                if other != name and (settings := traffic.settings(audit, other)) is not None:
                    found.append(settings)
    return found


def _application(serving: Serving, name: str) -> Any:
    """What Serve runs: replicas are started anew only if what they are made of is another, or their code."""
    from ray import serve

    autoscaling = serving.autoscaling
    fixed = serving.model_copy(update={"variants": {}, "salt": "", "policy": "weighted"})
    made_of = [fixed.model_dump(exclude={"autoscaling"}), code()]
    endpoint = serve.deployment(Endpoint).options(
        name=name,
        version=digest(made_of),
        _internal=True,  # for `version`: Serve would make one up, and start all replicas anew
        ray_actor_options={"num_cpus": serving.num_cpus},
        autoscaling_config={
            "min_replicas": autoscaling.min_replicas,
            "max_replicas": autoscaling.max_replicas,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
            "policy": {
                "policy_function": "app.serving.autoscaling:ByLoad",
                "policy_kwargs": {"target": autoscaling.target_load},
            },
            **METRICS,
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        logging_config={"encoding": "JSON"},
        # A new replica starts before an old one stops, so one that cannot start takes nothing down.
        max_surge_percent=25,
    )
    return endpoint.bind(name, fixed, _issuer(serving))


def _issuer(serving: Serving) -> Issuer | None:
    """Whose tokens the endpoint takes."""
    if serving.auth == "none":
        return None
    if serving.auth == "local":
        return Issuer(issuer=issuer.ISSUER, audience=issuer.AUDIENCE, jwks=str(issuer.jwks()))
    return serving.auth


def curl(server: str, name: str, variant: Deployed) -> str:
    """A command line that asks the endpoint about the first row of a variant's stored example."""
    row = json.loads((variant.path / "example.json").read_text())["rows"][0]
    body = json.dumps({"unit": "user-17", "rows": [row]}).replace("'", "'\\''")
    return f"curl -s {server}/v2/models/{name}/predict -H 'content-type: application/json' -d '{body}'"


def undeploy() -> None:
    """Take all endpoints off the cluster, and Serve with them. Nothing happens if there are none."""
    from ray import serve

    serve.shutdown()


def take_off(name: str, on_wait: Callable[[str], None] | None = None) -> None:
    """Take one endpoint off the cluster; the others go on. Serve goes with the last one.

    Raises UserError if it is not served.
    """
    from ray import serve

    with traffic.alone(name, on_wait), Audit() as audit:
        served = models(serve.status().applications)
        # The entry first: what a kill leaves is then known to be unwanted, and the same command stops it.
        traffic.take_off(audit, name)
        if name in served:
            serve.delete(name)
        stop_workers(audit, name)
        if name not in served:
            raise UserError(f"{name} is not served; these are: {', '.join(served) or 'none'}")
        if served == [name]:
            serve.shutdown()


def _start(serving: Serving) -> None:
    """Serve's controller and HAProxy. Serve may already run, on the same port."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _require_free(serving.port)
        serve.start(http_options={"host": _replicas_host(serving), "port": serving.port})
    elif client.http_config.port != serving.port:
        raise UserError(
            f"serving.port is {serving.port}, but this cluster already serves on port "
            f"{client.http_config.port}, and can on one only. Change serving.port, or take the other "
            "endpoints off first."
        )


def _replicas_host(serving: Serving) -> str:
    """The interface on which replicas listen for HAProxy: loopback, or all where it may be on another node.

    Raises UserError if they would answer anybody there.
    """
    import ray

    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        return HOST
    if serving.auth == "none":
        raise UserError(
            "serving.auth must be local or an issuer: this cluster has several nodes, so the replicas can be "
            "asked over its network"
        )
    return "0.0.0.0"


def _require_free(port: int, setting: str = "serving.port") -> None:
    """HAProxy would share a taken port with whoever has it instead of failing."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} must be free on {HOST} for the endpoint ({error.strerror}). Stop what uses it, "
                f"or choose another with {setting}."
            ) from error


def _wait(url: str, name: str) -> None:
    paths = ("/v2/health/live", f"/v2/models/{name}/ready")
    deadline = time.monotonic() + READY_TIMEOUT_S
    # Only whether it answers: that it is ours is known, and its certificate names another host.
    with httpx.Client(base_url=url, trust_env=False, timeout=5, verify=False) as client:
        while time.monotonic() < deadline:
            try:
                if all(client.get(path).status_code == 200 for path in paths):
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
    raise UserError(f"{url}{paths[1]} did not answer within {READY_TIMEOUT_S:g} s; see Ray Serve's logs")
