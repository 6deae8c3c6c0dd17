"""Applications of Ray Serve: how a deployment is created, and how an application is started.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
"""

import hashlib
import json
from typing import Any

from app.errors import UserError, describe_traceback
from app.state.fingerprint import fingerprint

MAX_ONGOING_REQUESTS = 100
"""Maximum number of requests in progress per replica; further requests wait. It is far above the autoscaler's
target, so that a burst is accepted while new replicas start."""
HEALTH_CHECK_PERIOD_S = 5.0
"""Interval between two health checks of a replica."""
GUARD_MODULE = "app.serving.gateway.guard"
"""Module that Serve runs in every replica, see `app.cluster.flags`."""
AUTOSCALING_INTERVALS = {"metrics_interval_s": 0.5, "look_back_period_s": 1.0}
"""Interval at which a replica reports its load to the autoscaler, and time over which the autoscaler averages
it. With Serve's defaults of 10 s and 30 s, the delays in the project file would have no effect. (Ray
deprecates the first in favour of environment variables that 2.60 does not read.)"""


def create_deployment(replica: type, name: str, inputs: Any, **options: Any) -> Any:
    """A Serve deployment of a class. Its replicas restart only if their inputs or their code change.

    :param inputs: JSON values that the behaviour of a replica depends on.
    :param options: further options of Serve.
    """
    from ray import serve

    code = fingerprint(replica.__module__, GUARD_MODULE)
    version = hashlib.sha256(json.dumps([inputs, code], sort_keys=True).encode()).hexdigest()[:16]
    # _internal: otherwise Serve accepts no version, creates one for each deploy, and restarts all replicas.
    return serve.deployment(replica).options(name=name, version=version, _internal=True, **options)


def run_application(bound: Any, application: str, deployment: str, route: str | None) -> None:
    """Start an application, or update it, and wait until it runs.

    :param bound: the deployment of the application with its arguments, the result of `Deployment.bind`.
    :param deployment: name of that deployment.
    :param route: prefix of the application's HTTP paths; None if it answers no HTTP requests.
    :raises UserError: Serve cannot start it. The replicas of its previous deployment then keep running.
    """
    from ray import serve

    try:
        serve.run(bound, name=application, route_prefix=route)
    except RuntimeError as error:
        # Serve's own error does not have the reason; the end of the status message does.
        message = serve.status().applications[application].deployments[deployment].message
        raise UserError(
            f"Ray Serve could not start {application}: {describe_traceback(message)}. "
            "Replicas that ran before keep running."
        ) from error
