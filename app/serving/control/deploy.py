"""Deploys endpoints on the cluster. Call these functions in a session of `app.cluster`.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
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
    AUTOSCALING_INTERVALS,
    HEALTH_CHECK_PERIOD_S,
    MAX_ONGOING_REQUESTS,
    create_deployment,
    run_application,
)
from app.serving.control.replicas import refresh
from app.serving.control.undeploy import undeploy_all
from app.serving.control.workers import start_workers, stop_unused_workers
from app.serving.gateway import frontend, issuer, preflight, settings
from app.serving.gateway.bounds import MAX_BODY_BYTES
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.serving.names import model_names
from app.serving.replica.deployment import Replica
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant, common_schema, open_bundles
from app.state import locks, shared
from app.state.audit import Audit

READY_TIMEOUT_S = 60.0
"""Time for a running endpoint to answer through HAProxy; it takes about 1 s on an idle machine."""


def deploy(
    serving: Serving,
    name: str,
    traffic: Traffic,
    on_wait: Callable[[str], None] | None = None,
    *,
    start_monitoring: Callable[[], None] = lambda: None,
) -> str:
    """Deploy the endpoint of a model, or replace it, and wait until it answers; returns the server's URL.

    The endpoint is below the URL at `/v2/models/<name>`. If only the traffic changes, the replicas keep
    running and load it.

    :param on_wait: called with a message if somebody else is changing the endpoint or the server.
    :param start_monitoring: called when the server runs, before the endpoint is replaced.
    :raises UserError: the cluster has another frontend, the port is taken, a bundle is broken, the variants
        take different inputs, or Serve cannot start the replicas.
    """
    shared.require_shared()
    requested = frontend.frontend_of(serving)
    preflight.check_files(serving)
    if serving.limits.max_body_bytes > MAX_BODY_BYTES:
        raise UserError(f"serving.limits.max_body_bytes must be at most {MAX_BODY_BYTES:,}")
    # Checked here, because an error in a replica would be a traceback in Serve's log.
    bundles = open_bundles(traffic.variants, serving.trusted_keys)
    common_schema({variant: bundle.schema for variant, bundle in bundles.items()})
    with locks.exclusive(server.LOCK, on_wait), traffics.endpoint_lock(name, on_wait):
        _deploy(serving, name, traffic, requested, start_monitoring)
    return requested.url


def _deploy(
    serving: Serving,
    name: str,
    traffic: Traffic,
    requested: Frontend,
    start_monitoring: Callable[[], None],
) -> None:
    """Deploy an endpoint behind the gateway; the gateway gets the requested frontend if it may change."""
    from ray import serve

    backend = Backend(_issuer(serving), serving.limits.max_wait_s, serving.limits.max_body_bytes)
    deployed = set(model_names(serve.status().applications))
    current = settings.read() if deployed else None
    frontend.require_compatible(current, name, requested, backend.secured, server.num_nodes(), deployed)
    if not deployed and server.is_running():
        undeploy_all()  # left by a command that was killed
    backends = {n: b for n, b in current.backends.items() if n in deployed} if current else {}
    # An endpoint without tokens must never be reachable from other machines. If the endpoint will require
    # tokens, the frontend changes after it; otherwise the frontend changes, to a loopback address, before it.
    during = Gateway(
        current.frontend if current and backend.secured else requested,
        backends | {name: backend.merged(backends.get(name, backend))},
    )
    after = Gateway(requested, backends | {name: backend})
    try:
        server.open_gateway(during)
        server.start_root(hides_models=backend.secured or any(b.secured for b in backends.values()))
        start_monitoring()
        _replace(serving, name, traffic, during.frontend.url)
        if after != during:
            server.open_gateway(after)
            server.start_root(hides_models=any(b.secured for b in after.backends.values()))
            _wait_until_ready(requested.url, name)
    except BaseException:
        if not deployed:
            undeploy_all()
        raise


def _replace(serving: Serving, name: str, traffic: Traffic, url: str) -> None:
    """Start the replicas and workers of an endpoint, and let them load the traffic; undo it if that fails."""
    from ray import serve

    is_new = name not in serve.status().applications
    with Audit() as audit:
        try:
            start_workers(name, serving, traffic)
            with traffics.set_with_rollback(audit, name, traffic, serving) as entry:
                run_application(_application(serving, name), name, name, f"/v2/models/{name}")
                _wait_until_ready(url, name)
                refresh(name, entry)
        except BaseException:
            if is_new:
                serve.delete(name)
            raise
        finally:
            stop_unused_workers(audit, name)


def _application(serving: Serving, name: str) -> Any:
    """The Serve application of an endpoint's replicas."""
    autoscaling = serving.autoscaling
    # Replicas read the variants from the audit log, so that a change of traffic does not restart them.
    fixed = serving.model_copy(update={"variants": {}, "salt": "", "policy": "weighted"})
    # Settings of the autoscaler and of the server, which replicas do not use.
    unused = {"autoscaling", "host", "port", "grpc_port", "tls"}
    endpoint = create_deployment(
        Replica,
        name,
        fixed.model_dump(exclude=unused),
        ray_actor_options={"num_cpus": serving.num_cpus},
        autoscaling_config={
            "min_replicas": autoscaling.min_replicas,
            "max_replicas": autoscaling.max_replicas,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
            "policy": {
                "policy_function": "app.serving.replica.autoscaling:LoadPolicy",
                "policy_kwargs": {"target": autoscaling.target_load},
            },
            **AUTOSCALING_INTERVALS,
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        logging_config={"encoding": "JSON"},
        # A new replica starts before an old one stops, so that a replica which cannot start stops none.
        max_surge_percent=25,
    )
    return endpoint.bind(name, fixed, _issuer(serving))


def _issuer(serving: Serving) -> Issuer | None:
    """The issuer whose tokens the endpoint accepts; None if it requires no tokens."""
    if serving.auth == "none":
        return None
    if serving.auth == "local":
        return Issuer(issuer=issuer.ISSUER, audience=issuer.AUDIENCE, jwks=str(issuer.jwks()))
    return serving.auth


def _wait_until_ready(url: str, name: str) -> None:
    """Wait until the server and the endpoint answer at the URL. Raises UserError after READY_TIMEOUT_S."""
    paths = ("/v2/health/live", f"/v2/models/{name}/ready")
    deadline = time.monotonic() + READY_TIMEOUT_S
    # The certificate is not verified: it may be for another host name, and no data is sent.
    with httpx.Client(base_url=url, trust_env=False, timeout=5, verify=False) as client:
        while time.monotonic() < deadline:
            try:
                if all(client.get(path).status_code == 200 for path in paths):
                    return
            except httpx.TransportError:
                pass  # the server does not listen yet
            time.sleep(0.1)
    raise UserError(
        f"{url}{paths[1]} must answer within {READY_TIMEOUT_S:g} s, and has not; see Ray Serve's logs"
    )


def example_command(url: str, name: str, variant: DeployedVariant) -> str:
    """A curl command line that predicts the first row of a variant's stored example."""
    row = json.loads((variant.path / "example.json").read_text())["rows"][0]
    body = json.dumps({"unit": "user-17", "rows": [row]}).replace("'", "'\\''")
    return f"curl -s {url}/v2/models/{name}/predict -H 'content-type: application/json' -d '{body}'"
