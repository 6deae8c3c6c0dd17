"""Calls a method of every replica of a Ray Serve deployment.

Ray Serve reads its flags when it is imported, so the functions import it when they are called.
"""

from typing import Any

from app.errors import UserError

TIMEOUT_S = 10.0
"""Timeout of calls that may fail, such as those of `raylway status`."""
REFRESH_TIMEOUT_S = 120.0
"""Time for all replicas to open and verify the bundles of a new traffic."""
MAX_ATTEMPTS = 3
"""Maximum number of times that a refresh is sent; it is sent again if a replica dies."""


def broadcast(application: str, deployment: str, method: str, timeout_s: float | None = None) -> list[Any]:
    """Call a method of every replica; returns the results. Must not run in an event loop.

    Raises RayError if a replica dies, and TimeoutError after `timeout_s`.
    """
    from ray.serve.handle import DeploymentHandle

    # A handle for this call only: the threads of a handle that outlives the command's cluster would join any
    # cluster that they find, and the command would never end. It needs an event loop of its own, because our
    # flags let handles use the loop of the caller, who has none.
    handle: Any = DeploymentHandle(deployment, application)
    handle._init(_run_router_in_separate_loop=True)
    try:
        return handle.broadcast(method).results(timeout_s=timeout_s)
    finally:
        handle.shutdown()


def try_broadcast(application: str, deployment: str, method: str) -> list[Any]:
    """Like `broadcast`, but returns [] if the replicas do not answer, or run another version of Raylway."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return broadcast(application, deployment, method, TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError):
        return []


def refresh(name: str, entry: int) -> None:
    """Let every replica of an endpoint load the current traffic, whose number in the audit log is `entry`.

    Raises UserError if a replica cannot load it, or does not answer.
    """
    from ray.exceptions import RayError

    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            states = broadcast(name, name, "refresh", REFRESH_TIMEOUT_S)
            break
        except TimeoutError:
            raise UserError(
                f"every replica of {name} must answer within {REFRESH_TIMEOUT_S:g} s, and one has not; see "
                "Ray Serve's logs"
            ) from None
        except RayError as error:  # a replica died; the one that replaces it starts with the current traffic
            if attempt == MAX_ATTEMPTS:
                reason = str(error).splitlines()[0]
                raise UserError(f"the replicas of {name} do not answer: {reason}") from None
    if faults := {state.fault for state in states if state.entry < entry}:
        raise UserError(
            f"the replicas of {name} cannot load the new traffic: {'; '.join(map(str, faults))}. They keep "
            "serving the previous traffic."
        )
