"""Names of the applications that run on Ray Serve.

The application of an endpoint has the name of its model, which is in lower case. All other applications have
a capital letter or WORKERS_SEPARATOR in their names.
"""

from collections.abc import Iterable

from app.cluster.capacity import WORKERS_SEPARATOR

ROOT = "Raylway"
"""Application that answers for the server as a whole and keeps the counts of the rate limits."""
GRPC = "Grpc"
"""Application that runs the gRPC server."""
WATCH = "Watch"
"""Application that updates endpoints which follow the registry, or whose weights a bandit sets; see
`app.monitoring.deployment`."""


def workers_application(model: str, version: str) -> str:
    """Name of the application that runs the workers of a version."""
    return f"{model}{WORKERS_SEPARATOR}{version}"


def model_names(applications: Iterable[str]) -> list[str]:
    """Names of the models that have an endpoint, among the names of Serve's applications."""
    return [name for name in applications if name.islower() and WORKERS_SEPARATOR not in name]
