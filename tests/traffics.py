"""Write traffic entries to the audit log, as deployments do."""

from app.config import Serving
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit


def place(audit: Audit, model: str, traffic: Traffic, serving: Serving | None = None) -> int:
    """Set the current traffic of a model; returns the number of its entry."""
    with traffics.set_with_rollback(audit, model, traffic, serving) as number:
        return number
