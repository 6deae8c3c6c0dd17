"""The state of a replica, for `raylway status` and for deployments."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.serving.replica.meters import RequestStats
from app.serving.replica.recorder import RecorderStatus


@dataclass(frozen=True)
class State:
    """The traffic that a replica serves, its faults and its measurements."""

    entry: int
    """Number of the audit log's entry that the replica has loaded."""
    fault: str | None
    """Reason why the replica did not load a later entry, or cannot fetch the issuer's keys; else None."""
    versions: dict[str, str]
    """Version of each variant that is not a shadow."""
    weights: dict[str, float]
    """Weight of each variant that answers clients."""
    recording: RecorderStatus | None
    """State of the recorder; None if the endpoint keeps no records."""
    shadows: dict[str, int]
    """Number of requests that each shadow dropped or failed to predict."""
    recent: dict[str, RequestStats]
    """Statistics of the requests to each variant over the last minute."""
    hook_faults: Sequence[str] = ()
    """Messages on uses of Ray Serve's private parts that have no effect in this replica."""
