"""Changes the weights of a deployed endpoint."""

from collections.abc import Callable, Mapping

from app.errors import UserError
from app.serving.control.replicas import refresh
from app.serving.names import model_names
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit


def set_weights(
    name: str, weights: Mapping[str, float], on_wait: Callable[[str], None] | None = None
) -> Traffic:
    """Change the weights of some variants of an endpoint; returns the new traffic.

    `on_wait` is called with a message if somebody else is changing the endpoint. Raises UserError if the
    endpoint is not deployed, a bandit sets its weights, or the replicas cannot load the traffic.
    """
    from ray import serve

    with traffics.endpoint_lock(name, on_wait), Audit() as audit:
        current = traffics.read_current(audit, name)
        if current is None or name not in model_names(serve.status().applications):
            raise UserError(f"{name} is not served now; deploy it with `raylway serve` first")
        if current.traffic.policy == "bandit":
            raise UserError(
                f"serving.policy of {name} must be weighted to set weights; it is bandit, which sets them"
            )
        traffic = traffics.with_weights(current.traffic, weights)
        with traffics.set_with_rollback(
            audit, name, traffic, current.serving, expected=current.number
        ) as entry:
            refresh(name, entry)
    return traffic
