"""Putting endpoints on the cluster and taking them off again. Call these in a session of `app.cluster`.

Ray Serve reads its flags when it is imported, so it is imported in here only when something is called.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving.control import server
from app.serving.control.applications import (
    HEALTH_CHECK_PERIOD_S,
    MAX_ONGOING_REQUESTS,
    METRICS,
    deployment,
    refresh,
    run,
    start_workers,
    stop_workers,
)
from app.serving.gateway import frontend, issuer, preflight, settings
from app.serving.gateway.bounds import MAX_BODY_BYTES
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.serving.names import model_names
from app.serving.replica.deployment import Replica
from app.serving.traffic import traffic
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant, common_schema, open_bundles
from app.state import database, stages
from app.state.audit import Audit

READY_TIMEOUT_S = 60.0
"""For HAProxy to learn of replicas that run; about 1 s when idle."""


def deploy(
    serving: Serving,
    name: str,
    wanted: Traffic,
    on_wait: Callable[[str], None] | None = None,
    *,
    beside: Callable[[], None] = lambda: None,
) -> str:
    """Serve a registered model with this traffic, instead of what its endpoint served; wait until it answers.

    Where only the traffic is another one, the replicas go on and swap it in.

    :param on_wait: told who is waited for, if somebody else is changing this endpoint.
    :param beside: starts what runs on the server beside the endpoints, once the server runs.
    :returns: the server's URL; the endpoint is below it at `/v2/models/<name>`.
    :raises UserError: another endpoint of the cluster has another front, the port is taken, a bundle is
        broken, the variants take different inputs, or Serve could not start the replicas.
    """
    stages.require_shared()
    asked = frontend.frontend_of(serving)
    preflight.check_files(serving)
    if serving.limits.max_body_bytes > MAX_BODY_BYTES:
        raise UserError(f"serving.limits.max_body_bytes must be at most {MAX_BODY_BYTES:,}")
    # Said here in one line; said by a replica it would be a traceback in Serve's log.
    common_schema(
        {
            variant: bundle.schema
            for variant, bundle in open_bundles(wanted.variants, serving.trusted_keys).items()
        }
    )
    # Whoever puts endpoints behind the front, or takes them off, is alone at it.
    with database.alone("front", on_wait), traffic.endpoint_lock(name, on_wait):
        _behind_front(serving, name, wanted, asked, beside)
    return asked.url


def _behind_front(
    serving: Serving, name: str, wanted: Traffic, asked: Frontend, beside: Callable[[], None]
) -> None:
    """Serve it behind the cluster's front, which is changed if nobody else is behind it."""
    from ray import serve

    ours = Backend(_issuer(serving), serving.limits.max_wait_s, serving.limits.max_body_bytes)
    secured = ours.secured
    deployed = set(model_names(serve.status().applications))
    held = settings.read() if deployed else None
    frontend.require_compatible(held, name, asked, secured, server.num_nodes(), deployed)
    if not deployed and server.runs():
        undeploy()  # what a command that was killed has left
    before = {other: it for other, it in held.backends.items() if other in deployed} if held else {}
    # The front narrows before requests without a token are admitted, and widens after they no longer are.
    first = Gateway(
        held.frontend if held and secured else asked, before | {name: ours.merged(before.get(name, ours))}
    )
    last = Gateway(asked, before | {name: ours})
    try:
        server.open_frontend(first)
        server.start_root(secured or any(each.secured for each in before.values()))
        beside()
        _replace(serving, name, wanted, first.frontend.url)
        if last != first:
            server.open_frontend(last)
            server.start_root(any(each.secured for each in last.backends.values()))
            _wait(asked.url, name)
    except BaseException:
        if not deployed:
            undeploy()
        raise


def _replace(serving: Serving, name: str, wanted: Traffic, url: str) -> None:
    """Start the replicas and workers, and let them take the traffic in. Undone if that fails."""
    from ray import serve

    is_new = name not in serve.status().applications
    with Audit() as audit:
        try:
            start_workers(name, serving, wanted)
            with traffic.set_with_rollback(audit, name, wanted, serving) as entry:
                run(_application(serving, name), name, name, f"/v2/models/{name}")
                _wait(url, name)
                refresh(name, entry)
        except BaseException:
            if is_new:
                serve.delete(name)
            raise
        finally:
            stop_workers(audit, name)


def _application(serving: Serving, name: str) -> Any:
    """What Serve runs."""
    autoscaling = serving.autoscaling
    fixed = serving.model_copy(update={"variants": {}, "salt": "", "policy": "weighted"})
    elsewhere = {"autoscaling", "host", "port", "grpc_port", "tls"}  # see `app.serving.control.server`
    endpoint = deployment(
        Replica,
        name,
        fixed.model_dump(exclude=elsewhere),
        ray_actor_options={"num_cpus": serving.num_cpus},
        autoscaling_config={
            "min_replicas": autoscaling.min_replicas,
            "max_replicas": autoscaling.max_replicas,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
            "policy": {
                "policy_function": "app.serving.replica.autoscaling:ByLoad",
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


def curl(server: str, name: str, variant: DeployedVariant) -> str:
    """A command line that asks the endpoint about the first row of a variant's stored example."""
    row = json.loads((variant.path / "example.json").read_text())["rows"][0]
    body = json.dumps({"unit": "user-17", "rows": [row]}).replace("'", "'\\''")
    return f"curl -s {server}/v2/models/{name}/predict -H 'content-type: application/json' -d '{body}'"


def undeploy() -> None:
    """Take all endpoints off the cluster, and Serve with them. Nothing happens if there are none."""
    server.stop()
    settings.remove()


def take_off(name: str, on_wait: Callable[[str], None] | None = None) -> None:
    """Take one endpoint off the cluster; the others go on. Serve goes with the last one.

    Raises UserError if it is not served.
    """
    from ray import serve

    with database.alone("front", on_wait), traffic.endpoint_lock(name, on_wait), Audit() as audit:
        served = model_names(serve.status().applications)
        # The entry first: what a kill leaves is then known to be unwanted, and the same command stops it.
        traffic.record_undeploy(audit, name)
        if name in served:
            serve.delete(name)
        stop_workers(audit, name)
        if name not in served:
            raise UserError(f"{name} is not served; these are: {', '.join(served) or 'none'}")
        if served == [name]:
            undeploy()


def _wait(url: str, name: str) -> None:
    paths = ("/v2/health/live", f"/v2/models/{name}/ready")
    deadline = time.monotonic() + READY_TIMEOUT_S
    # Only readiness is checked: the server is ours, and its certificate may name another host.
    with httpx.Client(base_url=url, trust_env=False, timeout=5, verify=False) as client:
        while time.monotonic() < deadline:
            try:
                if all(client.get(path).status_code == 200 for path in paths):
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
    raise UserError(f"{url}{paths[1]} did not answer within {READY_TIMEOUT_S:g} s; see Ray Serve's logs")
