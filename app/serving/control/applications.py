"""The Serve applications that an endpoint consists of: its replicas, and the workers of heavy variants.

Ray Serve reads its flags when it is imported, so it is imported in here only when something is called.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from app.config import Serving
from app.config.serving import Workers
from app.errors import UserError, describe_traceback
from app.serving.control.status import broadcast
from app.serving.names import model_names, workers_application
from app.serving.replica.workers import Worker
from app.serving.traffic import traffic
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit
from app.state.database import Busy
from app.state.fingerprint import fingerprint

MAX_ONGOING_REQUESTS = 100
"""Requests that a replica has in hand at once; more wait. Far above what the autoscaler aims at, so that
a burst is taken in while new replicas start."""
HEALTH_CHECK_PERIOD_S = 5.0
REFRESH_TIMEOUT_S = 120.0
"""Time for all replicas to open, verify and try the bundles of a new traffic."""
TRIES = 3
"""Times that the replicas are asked to take a traffic in, if one dies meanwhile."""
MIDDLEWARES = "app.serving.gateway.guard"
"""The module that every replica runs for Serve, see `app.cluster.flags`."""
METRICS = {"metrics_interval_s": 0.5, "look_back_period_s": 1.0}
"""How often a replica tells the autoscaler its load, and over which time it averages. Serve's 10 s and 30 s
would outweigh the delays in the project file, which keep it from following each burst. (Ray deprecates the
first for environment variables that nothing reads in 2.60.)"""


def run(bound: Any, application: str, deployment: str, route: str | None) -> None:
    """Raises UserError if Serve cannot start it; what it served before goes on."""
    from ray import serve

    try:
        serve.run(bound, name=application, route_prefix=route)
    except RuntimeError as error:
        # Serve's own error names no reason; the status ends in the replica's.
        message = serve.status().applications[application].deployments[deployment].message
        raise UserError(
            f"Ray Serve could not start {application}: {describe_traceback(message)}. "
            "What was served before goes on."
        ) from error


def deployment(replica: type, name: str, inputs: Any, **options: Any) -> Any:
    """A Serve deployment of a class, whose replicas restart only if their inputs or their code change.

    `inputs` are JSON values, `options` those of Serve.
    """
    from ray import serve

    code = fingerprint(replica.__module__, MIDDLEWARES)
    version = hashlib.sha256(json.dumps([inputs, code], sort_keys=True).encode()).hexdigest()[:16]
    # _internal: otherwise Serve takes no version, makes up one for each deploy, and restarts all replicas.
    return serve.deployment(replica).options(name=name, version=version, _internal=True, **options)


def start_workers(model: str, serving: Serving, wanted: Traffic) -> None:
    """Replicas for the variants that have their own. Those that run already go on."""
    for name, variant in wanted.variants.items():
        if variant.workers is None:
            continue
        settings = serving.variants[name].workers if name in serving.variants else None
        settings = settings or Workers()
        what = variant.identity or str(variant.path)
        worker = deployment(
            Worker,
            "worker",
            [settings.model_dump(), what, serving.trusted_keys],
            ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
            autoscaling_config={
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
                "upscale_delay_s": serving.autoscaling.upscale_delay_s,
                "downscale_delay_s": serving.autoscaling.downscale_delay_s,
                "downscale_to_zero_delay_s": settings.idle_s,
                **METRICS,
            },
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
        )
        bound = worker.bind(model, variant, settings.max_batch_rows, serving.trusted_keys)
        run(bound, variant.workers, "worker", None)


def stop_workers(audit: Audit, name: str) -> None:
    """Stop the workers of versions that the endpoint's traffic does not name any more.

    The caller holds `traffic.endpoint_lock`; workers that another deploy has just started would be stopped.
    """
    from ray import serve

    try:
        held = traffic.read_current(audit, name)
    except UserError:
        return  # it cannot be known which are needed
    needed = {variant.workers for variant in held.traffic.variants.values()} if held else set()
    for application in serve.status().applications:
        if application.startswith(workers_application(name, "")) and application not in needed:
            serve.delete(application)


def stop_abandoned_workers(audit: Audit, name: str) -> None:
    """Stop the workers that a killed command has left, unless somebody is changing the endpoint."""
    with contextlib.suppress(Busy), traffic.endpoint_lock(name, wait=False):
        stop_workers(audit, name)


def reweight(
    name: str, weights: Mapping[str, float], on_wait: Callable[[str], None] | None = None
) -> Traffic:
    """Change the weights of some variants of an endpoint; returns what it then serves.

    Raises UserError if it is not served, its weights are a bandit's, or the replicas cannot take it in.
    """
    from ray import serve

    with traffic.endpoint_lock(name, on_wait), Audit() as audit:
        held = traffic.read_current(audit, name)
        if held is None or name not in model_names(serve.status().applications):
            raise UserError(f"{name} is not served now; deploy it with `raylway serve` first")
        if held.traffic.policy == "bandit":
            raise UserError(f"the bandit sets the weights of {name} (serving.policy)")
        wanted = traffic.with_weights(held.traffic, weights)
        with traffic.set_with_rollback(audit, name, wanted, held.serving, expected=held.number) as entry:
            refresh(name, entry)
    return wanted


def refresh(name: str, entry: int) -> None:
    """Have every replica take in an entry of the audit log. Raises UserError if one cannot, or is silent."""
    from ray.exceptions import RayError

    for attempt in range(TRIES):
        try:
            states = broadcast(name, name, "refresh", REFRESH_TIMEOUT_S)
            break
        except TimeoutError:
            raise UserError(f"a replica of {name} has not answered for {REFRESH_TIMEOUT_S:g} s") from None
        except RayError as error:  # it died; the one in its place begins with what holds
            if attempt == TRIES - 1:
                raise UserError(
                    f"the replicas of {name} do not answer: {str(error).splitlines()[0]}"
                ) from None
    if faults := {state.fault for state in states if state.entry < entry}:
        raise UserError(f"{name} does not take it in: {'; '.join(map(str, faults))}. What it served goes on.")
