"""What was deployed, promoted and changed, by whom: a log that is only added to, each entry sealed to the one
before it, so that a change to what was written shows."""

import getpass
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Column, Float, Index, Integer, String, Table, Text

from app import database
from app.database import TABLES
from app.errors import UserError

AUDIT = Table(
    "audit",
    TABLES,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False),
    Column("who", String(256), nullable=False),
    Column("action", String(32), nullable=False),
    Column("model", String(128), nullable=False),
    Column("details", Text, nullable=False),
    Column("seal", String(64), nullable=False),
    Index("audit_of_model", "model", "number"),
)
FIRST = "0" * 64
"""What the first entry is sealed to."""


@dataclass(frozen=True)
class Entry:
    """Something that somebody did."""

    number: int
    """1, 2, 3 and so on: one that was removed leaves a gap."""
    at: float
    """Seconds since the epoch."""
    who: str
    action: str
    model: str
    details: Mapping[str, Any]
    seal: str
    """SHA-256 of the seal before and of all the above."""


class Broken(UserError):
    """The log is not what was written."""


class Audit:
    """The log, open until the `with` block ends. Safe to use from several threads and processes."""

    def __init__(self) -> None:
        self._engine = database.connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, action: str, model: str, details: Mapping[str, Any], who: str | None = None) -> Entry:
        """Write an entry; returns when it is durable. `who` is the user of this process, if None."""
        with self._engine.begin() as connection:
            database.begin_exclusively(connection, "audit")
            last = connection.execute(AUDIT.select().order_by(AUDIT.c.number.desc()).limit(1)).first()
            number, before = (last.number + 1, last.seal) if last else (1, FIRST)
            values = {
                "number": number,
                "at": time.time(),
                "who": who or getpass.getuser(),
                "action": action,
                "model": model,
                "details": json.dumps(details),
            }
            values["seal"] = _seal(before, values)
            connection.execute(AUDIT.insert(), values)
        return _entry(values)

    def entries(self, model: str | None = None, action: str | None = None) -> list[Entry]:
        """All entries, or those of a model or an action, the oldest first. Raises Broken."""
        found, before, number = [], FIRST, 1
        with self._engine.connect() as connection:
            for row in connection.execute(AUDIT.select().order_by(AUDIT.c.number)):
                values = dict(row._mapping)
                if row.number != number or _seal(before, values) != row.seal:
                    raise Broken(f"the audit log is not what was written: see its entry {number}")
                before, number = row.seal, number + 1
                if model in (None, row.model) and action in (None, row.action):
                    found.append(_entry(values))
        return found

    def last(self, model: str, action: str, until: float | None = None) -> Entry | None:
        """A model's newest entry of an action, or the newest until a time (seconds since the epoch)."""
        query = AUDIT.select().where(AUDIT.c.model == model, AUDIT.c.action == action)
        if until is not None:
            query = query.where(AUDIT.c.at <= until)
        with self._engine.connect() as connection:
            row = connection.execute(query.order_by(AUDIT.c.number.desc()).limit(1)).first()
        return _entry(dict(row._mapping)) if row else None

    def close(self) -> None:
        self._engine.dispose()


def _entry(values: Mapping[str, Any]) -> Entry:
    return Entry(**{**values, "details": json.loads(values["details"])})


def _seal(before: str, values: Mapping[str, Any]) -> str:
    content = [before, *(values[name] for name in ("number", "at", "who", "action", "model", "details"))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
