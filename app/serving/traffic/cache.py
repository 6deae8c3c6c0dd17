"""A copy of the newest traffic on this machine, so that a replica can start without the database.

Each entry of the audit log has a file of its own: a replica that is late cannot overwrite a newer entry.
"""

from pathlib import Path
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from app.errors import UserError
from app.serving.logs import log
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.state import engine, files
from app.state.audit import Audit
from app.state.home import home, make_private


class NewestTraffic(NamedTuple):
    """The newest traffic that could be read, from the database or from the cache."""

    number: int
    """Number of its entry in the audit log."""
    traffic: Traffic
    fault: str | None = None
    """Reason why the database may have a newer entry; None if it was read from the database."""


def read_with_fallback(audit: Audit, model: str) -> NewestTraffic:
    """Read a model's current traffic from the database, or from the cache if the database does not answer.

    Raises UserError if the endpoint has no traffic, or the database does not answer and the cache is empty.
    """
    try:
        current = traffics.read_current(audit, model)
    except (SQLAlchemyError, OSError) as error:
        reason = engine.reason(error)
        cached = load(model)
        if cached is None:
            raise UserError(
                f"the database does not answer ({reason}), and this machine has no copy of the traffic of "
                f"{model}; the replica can start when the database answers again"
            ) from error
        fault = (
            f"the database does not answer ({reason}); serving entry {cached.number} of the audit log, the "
            "newest that this machine has a copy of"
        )
        log.warning("%s: %s", model, fault)
        return cached._replace(fault=fault)
    if current is None:
        raise UserError(f"{model} has no traffic; deploy it with `raylway serve` first")
    return NewestTraffic(current.number, current.traffic)


def store(model: str, number: int, traffic: Traffic) -> None:
    """Keep the traffic of an entry, and remove those of older entries. Errors are logged, not raised."""
    try:
        _write(model, number, traffic)
    except OSError as error:
        log.warning("cannot cache the traffic of %s for a start without the database: %s", model, error)


def load(model: str) -> NewestTraffic | None:
    """The newest entry in the cache; None if there is none."""
    for file in sorted(_folder(model).glob("*.json"), reverse=True):
        try:
            return NewestTraffic(int(file.stem), Traffic.model_validate_json(file.read_bytes()))
        except (OSError, ValueError, UserError):
            continue  # written by another version of Raylway, or just removed
    return None


def _write(model: str, number: int, traffic: Traffic) -> None:
    file = make_private(_folder(model)) / f"{number:012d}.json"
    if not file.exists():
        files.write(file, traffic.model_dump_json(), mode=0o600)
    for other in file.parent.glob("*.json"):
        if other.name < file.name:
            other.unlink(missing_ok=True)


def _folder(model: str) -> Path:
    return home() / "traffic" / model
