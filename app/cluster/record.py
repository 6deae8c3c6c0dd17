"""The cluster that `raylway up` has started, as the state directory tells of it."""

import json
from dataclasses import dataclass

import psutil

from app.errors import UserError
from app.state.home import home


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that `up` started, as recorded in `home() / "cluster.json"`."""

    address: str
    """Where drivers connect: host:port of Ray's control store."""
    dashboard_url: str
    """Serves the dashboard and the Jobs API."""
    pid: int
    """The process that holds the others, `ray start --block`."""
    created_s: float
    """When that process was created, seconds since the epoch: tells it from a later one with its pid."""
    token_path: str
    directory: str
    """Ray's own directory: sessions, logs, sockets. Gone after `down`."""

    def alive(self) -> bool:
        try:
            head = psutil.Process(self.pid)
            # A tolerance, because psutil derives the time from the boot time, which clock steps move.
            same = abs(head.create_time() - self.created_s) < 1.0
            return same and head.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def recorded() -> Cluster | None:
    """The cluster in this state directory's record, dead or alive. Raises UserError if it cannot be read."""
    record = home() / "cluster.json"
    try:
        return Cluster(**json.loads(record.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{record}: must be what `raylway up` of this version wrote, but: {error}. Remove it, and end "
            "the process `ray start` of a cluster that may still be up"
        ) from None
