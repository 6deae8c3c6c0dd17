"""The newest traffic that replicas on this machine have loaded: one that starts while the database is away
serves it. A file for each entry of the audit log, so that no replica overwrites a newer one."""

import os
import tempfile
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from app.errors import UserError
from app.serving.logs import log
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit
from app.state.home import home, make_private


def first(audit: Audit, model: str) -> tuple[int, Traffic, str | None]:
    """The entry and traffic that a replica starts with; and why they may not be the newest, if they may not.

    Raises UserError if the endpoint has no traffic, or none is known while the database is away.
    """
    try:
        held = traffics.current(audit, model)
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        known = remembered(model)
        if known is None:
            raise UserError(
                f"the database does not answer ({reason}), and no traffic of {model} was loaded here before; "
                "the replica can start once it answers"
            ) from error
        fault = (
            f"the database does not answer ({reason}); entry {known[0]} of the audit log, the newest known "
            "here, is taken for the newest"
        )
        log.warning("%s: %s", model, fault)
        return *known, fault
    if held is None:
        raise UserError(f"{model} has no traffic; say `raylway serve` first")
    return held.number, held.traffic, None


def remember(model: str, entry: int, traffic: Traffic) -> None:
    """Keep the traffic of an entry; older ones are removed."""
    try:
        _write(model, entry, traffic)
    except OSError as error:  # the replica serves all the same
        log.warning("the traffic of %s cannot be kept for a start without the database: %s", model, error)


def _write(model: str, entry: int, traffic: Traffic) -> None:
    folder = make_private(_folder(model))
    file = folder / f"{entry:012d}.json"
    if not file.exists():
        descriptor, draft = tempfile.mkstemp(dir=folder)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(traffic.model_dump_json())
        Path(draft).rename(file)
    for other in folder.glob("*.json"):
        if other.name < file.name:
            other.unlink(missing_ok=True)


def remembered(model: str) -> tuple[int, Traffic] | None:
    """The number and traffic of the newest entry that was remembered; None if there is none."""
    for file in sorted(_folder(model).glob("*.json"), reverse=True):
        try:
            return int(file.stem), Traffic.model_validate_json(file.read_bytes())
        except (OSError, ValueError, UserError):
            continue  # of another version of Raylway, or just removed
    return None


def _folder(model: str) -> Path:
    return home() / "traffic" / model
