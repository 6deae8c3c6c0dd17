"""How Ray Serve's applications are named.

The application of a model has the model's name, which has no capital. Others have a capital, or WORKERS_MARK.
"""

from collections.abc import Iterable

ROOT = "Raylway"
"""Answers for the server as a whole, and counts requests for the rate limits."""
GRPC = "Grpc"
"""The server for gRPC."""
WATCH = "Watch"
"""Looks after the endpoints, see `app.monitoring.deployment`."""
WORKERS_MARK = "@"
"""Between a model's name and a version's number, in the name of the application of its workers."""


def workers_of(model: str, version: str) -> str:
    """Name of the application that runs the workers of a version."""
    return f"{model}{WORKERS_MARK}{version}"


def models(applications: Iterable[str]) -> list[str]:
    """The names of the models that have an endpoint, of the names of Serve's applications."""
    return [name for name in applications if name.islower() and WORKERS_MARK not in name]
