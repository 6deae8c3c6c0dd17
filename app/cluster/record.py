"""The record of the cluster that `raylway up` started, in the state directory."""

import json
from dataclasses import dataclass

import psutil

from app.errors import UserError
from app.state.home import home


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that `raylway up` started, as recorded in `home() / "cluster.json"`."""

    address: str
    """Address that drivers connect to: host:port of Ray's control store."""
    dashboard_url: str
    """URL of the dashboard and the Jobs API."""
    pid: int
    """Process id of `ray start --block`, which owns the cluster."""
    created_s: float
    """Start time of that process, in seconds since the epoch. A later process with the same id has another
    one."""
    token_path: str
    """File with the authentication token."""
    directory: str
    """Directory of the cluster: sessions, logs, sockets. `raylway down` removes it."""

    def alive(self) -> bool:
        """Whether the process that owns the cluster still runs."""
        try:
            head = psutil.Process(self.pid)
            # With a tolerance: psutil derives start times from the boot time, which clock steps move.
            is_same = abs(head.create_time() - self.created_s) < 1.0
            return is_same and head.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def read_record() -> Cluster | None:
    """The recorded cluster, alive or not; None if there is no record.

    Raises UserError if the record cannot be read.
    """
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
