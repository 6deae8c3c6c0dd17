"""The state of a replica, as `raylway status` and deployments ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.serving.replica.meters import RequestStats
from app.serving.replica.recorder import RecorderStatus


@dataclass(frozen=True)
class State:
    """What a replica serves, and how it does."""

    entry: int
    """Number of the audit log's entry that the replica has loaded."""
    fault: str | None
    """Reason why it did not load a later entry."""
    versions: dict[str, str]
    """Version of each variant that answers."""
    weights: dict[str, float]
    recording: RecorderStatus | None
    """State of the recorder; None if the endpoint keeps no records."""
    shadows: dict[str, int]
    """Requests that each shadow dropped or failed to answer."""
    recent: dict[str, RequestStats]
    """Requests of each variant over the last minute."""
    hook_faults: Sequence[str] = ()
    """Uses of Ray Serve's private parts that have no effect in this replica, and what follows from that."""
