"""Entries of the audit log with a traffic, as deployments write them."""

from app.config import Serving
from app.serving.traffic import traffic
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit


def place(audit: Audit, model: str, wanted: Traffic, serving: Serving | None = None) -> int:
    """Let a traffic hold, as a deployment does; returns the entry's number."""
    with traffic.set_with_rollback(audit, model, wanted, serving) as number:
        return number
