"""Removes endpoints from the cluster. Call these functions in a session of `app.cluster`.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
"""

from collections.abc import Callable

from app.errors import UserError
from app.serving.control import server
from app.serving.control.workers import stop_unused_workers
from app.serving.gateway import settings
from app.serving.names import model_names
from app.serving.traffic import traffic
from app.state import locks
from app.state.audit import Audit


def undeploy(name: str, on_wait: Callable[[str], None] | None = None) -> None:
    """Remove an endpoint. The server stops with the last one.

    `on_wait` is called with a message if somebody else is changing the endpoint or the server. Raises
    UserError if the endpoint is not deployed.
    """
    from ray import serve

    with locks.exclusive(server.LOCK, on_wait), traffic.endpoint_lock(name, on_wait), Audit() as audit:
        deployed = model_names(serve.status().applications)
        # Record the removal first: if this process is then killed, the same command can remove the rest.
        traffic.record_undeploy(audit, name)
        if name in deployed:
            serve.delete(name)
        stop_unused_workers(audit, name)
        if name not in deployed:
            raise UserError(f"{name} is not served; served are: {', '.join(deployed) or 'none'}")
        if deployed == [name]:
            undeploy_all()


def undeploy_all() -> None:
    """Stop the server with all endpoints. Does nothing if it does not run."""
    server.stop()
    settings.remove()
