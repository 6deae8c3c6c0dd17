"""Starts and stops the workers of heavy variants and of shadows: an application for each version.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
"""

import contextlib

from app.config import Serving
from app.config.serving import Workers
from app.errors import UserError
from app.serving.control.applications import (
    AUTOSCALING_INTERVALS,
    HEALTH_CHECK_PERIOD_S,
    MAX_ONGOING_REQUESTS,
    create_deployment,
    run_application,
)
from app.serving.names import workers_application
from app.serving.replica.workers import Worker
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit
from app.state.locks import Busy


def start_workers(model: str, serving: Serving, traffic: Traffic) -> None:
    """Start the workers of the variants that have some. Workers that run already keep running.

    Raises UserError if Serve cannot start them.
    """
    for name, variant in traffic.variants.items():
        if variant.workers is None:
            continue
        settings = serving.variants[name].workers if name in serving.variants else None
        settings = settings or Workers()
        bundle = variant.identity or str(variant.path)
        worker = create_deployment(
            Worker,
            "worker",
            [settings.model_dump(), bundle, serving.trusted_keys],
            ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
            autoscaling_config={
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
                "upscale_delay_s": serving.autoscaling.upscale_delay_s,
                "downscale_delay_s": serving.autoscaling.downscale_delay_s,
                "downscale_to_zero_delay_s": settings.idle_s,
                **AUTOSCALING_INTERVALS,
            },
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
        )
        bound = worker.bind(model, variant, settings.max_batch_rows, serving.trusted_keys)
        run_application(bound, variant.workers, "worker", None)


def stop_unused_workers(audit: Audit, name: str) -> None:
    """Stop the workers of versions that the endpoint's traffic does not name.

    The caller holds `traffic.endpoint_lock`: otherwise the workers of a deploy in progress would be stopped.
    """
    from ray import serve

    try:
        current = traffics.read_current(audit, name)
    except UserError:
        return  # without the traffic, it is unknown which workers are unused
    needed = {variant.workers for variant in current.traffic.variants.values()} if current else set()
    for application in serve.status().applications:
        if application.startswith(workers_application(name, "")) and application not in needed:
            serve.delete(application)


def stop_abandoned_workers(audit: Audit, name: str) -> None:
    """Stop the workers that a killed command has left, unless somebody is changing the endpoint."""
    with contextlib.suppress(Busy), traffics.endpoint_lock(name, wait=False):
        stop_unused_workers(audit, name)
