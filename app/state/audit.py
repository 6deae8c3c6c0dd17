"""The audit log: who deployed, promoted and changed what. Entries are only added.

Each entry is sealed to the previous one, and `app.state.audit_head` stores the newest, so that a change to
the log is detected.
"""

import contextlib
import getpass
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import sqlalchemy
from sqlalchemy import Column, Float, Index, Integer, String, Table, Text

from app.errors import UserError
from app.state import audit_head, database
from app.state.audit_head import BrokenLog, Head
from app.state.database import TABLES

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
SEALED_COLUMNS = ("number", "at", "who", "action", "model", "details")
FIRST_SEAL = "0" * 64
"""Seal that the first entry is sealed to."""


@dataclass(frozen=True)
class Entry:
    """An action of a user."""

    number: int
    """Number of the entry: 1, 2, 3 and so on without gaps."""
    at: float
    """Time, seconds since the epoch."""
    who: str
    action: str
    model: str
    details: Mapping[str, Any]
    seal: str
    """SHA-256 of the previous entry's seal and of the fields above."""


class Conflict(UserError):
    """Another user or process changed the state on which a change is based."""


class Audit:
    """The log, open until the `with` block ends. Safe to use from several threads and processes."""

    def __init__(self) -> None:
        self._engine = database.connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(
        self,
        action: str,
        model: str,
        details: Mapping[str, Any],
        who: str | None = None,
        *,
        expected: int | None = None,
        among: Sequence[str] = (),
    ) -> Entry:
        """Write an entry; returns it when it is durable. `who` is the user of this process if None.

        With `expected`, the entry is written only if the model's newest entry with an action in `among` has
        this number (0 stands for no entry). Raises Conflict otherwise.
        """
        with self._engine.begin() as connection:
            database.begin_exclusively(connection, "audit")
            if expected is not None:
                _require_newest(connection, model, among, expected)
            last = connection.execute(AUDIT.select().order_by(AUDIT.c.number.desc()).limit(1)).first()
            number, previous_seal = (last.number + 1, last.seal) if last else (1, FIRST_SEAL)
            values = {
                "number": number,
                "at": time.time(),
                "who": who or getpass.getuser(),
                "action": action,
                "model": model,
                "details": json.dumps(details, allow_nan=False),
            }
            values["seal"] = _seal(previous_seal, values)
            connection.execute(AUDIT.insert(), values)
        # The entry is written even if the head cannot be; `entries` reports what is wrong with the head.
        with contextlib.suppress(BrokenLog, OSError):
            self._advance(audit_head.load(), _entry(values))
        return _entry(values)

    def _advance(self, head: Head | None, newest: Entry) -> None:
        """Store the newest entry as the head. Raises BrokenLog if it is not chained to the previous head."""
        if head is not None:
            since = AUDIT.select().where(AUDIT.c.number.between(head.number, newest.number))
            with self._engine.connect() as connection:
                rows = connection.execute(since.order_by(AUDIT.c.number)).all()
            if not rows or Head(rows[0].number, rows[0].seal) != head:
                raise _broken(head.number)
            for previous, row in itertools.pairwise(rows):
                is_next = row.number == previous.number + 1
                if not is_next or _seal(previous.seal, dict(row._mapping)) != row.seal:
                    raise _broken(row.number)
        audit_head.store(Head(newest.number, newest.seal))

    def entries(
        self,
        model: str | None = None,
        action: str | None = None,
        *,
        expected: Head | None = None,
        since: Head | None = None,
    ) -> list[Entry]:
        """All entries, or those of a model or with an action, the oldest first; with `since`, only those
        after this entry.

        Checks the log up to this machine's head and up to `expected`, a head that was stored elsewhere. With
        `since` and a head, it checks from the oldest of these entries on, else from the first. Raises
        BrokenLog if an entry was changed or removed.
        """
        # Load the head before the entries: an entry written in between may become the head.
        head = audit_head.load()
        checkpoints: dict[int, Head] = {}
        for checkpoint in (head, expected, since):
            if checkpoint and checkpoints.setdefault(checkpoint.number, checkpoint) != checkpoint:
                raise _broken(checkpoint.number)
        start = min(checkpoints) if head and since else 0
        entries, previous_seal, number = [], FIRST_SEAL, start or 1
        with self._engine.connect() as connection:
            for row in connection.execute(
                AUDIT.select().where(AUDIT.c.number >= start).order_by(AUDIT.c.number)
            ):
                values = dict(row._mapping)
                # The entry at `start` is a checkpoint: its seal is compared below.
                is_sealed = number == start or _seal(previous_seal, values) == row.seal
                if row.number != number or not is_sealed:
                    raise _broken(number)
                checkpoint = checkpoints.pop(number, None)
                if checkpoint is not None and checkpoint.seal != row.seal:
                    raise _broken(number)
                previous_seal, number = row.seal, number + 1
                is_selected = model in (None, row.model) and action in (None, row.action)
                if is_selected and (since is None or row.number > since.number):
                    entries.append(_entry(values))
        if checkpoints:
            raise BrokenLog(
                f"the audit log ends before its entry {number}, but it had {max(checkpoints)}: entries were "
                f"cut off its end. If you restored the database from a backup, remove {audit_head.folder()}."
            )
        if number > 1:
            audit_head.store(Head(number - 1, previous_seal))
        return entries

    def head(self) -> Head | None:
        """The newest entry; None if there is none. Raises BrokenLog if the entries after this machine's head
        are not chained to it."""
        self.entries(since=audit_head.load())
        return audit_head.load()

    def last(self, model: str, actions: Sequence[str], until: float | None = None) -> Entry | None:
        """A model's newest entry with one of these actions, or the newest up to a time in seconds since the
        epoch.

        The newest is the one with the largest number, whatever its time. Raises BrokenLog if it was changed.
        """
        return next(self.newest_first(model, actions, until), None)

    def newest_first(
        self,
        model: str,
        actions: Sequence[str],
        until: float | None = None,
        *,
        since: Head | None = None,
    ) -> Iterator[Entry]:
        """A model's entries with these actions, the newest first, up to a time and after an entry.

        Each entry is checked. Raises BrokenLog if one was changed.
        """
        query = AUDIT.select().where(AUDIT.c.model == model, AUDIT.c.action.in_(actions))
        if until is not None:
            query = query.where(AUDIT.c.at <= until)
        if since is not None:
            query = query.where(AUDIT.c.number > since.number)
        while (entry := self._checked(query.order_by(AUDIT.c.number.desc()).limit(1))) is not None:
            yield entry
            query = query.where(AUDIT.c.number < entry.number)

    def _checked(self, query: sqlalchemy.Select) -> Entry | None:
        """The first entry of a query. Raises BrokenLog if its seal does not match it."""
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            previous_seal = FIRST_SEAL
            if row.number > 1:
                seals = sqlalchemy.select(AUDIT.c.seal).where(AUDIT.c.number == row.number - 1)
                previous_seal = str(connection.scalar(seals))
        values = dict(row._mapping)
        if _seal(previous_seal, values) != row.seal:
            raise _broken(row.number)
        return _entry(values)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


def _entry(values: Mapping[str, Any]) -> Entry:
    return Entry(**{**values, "details": json.loads(values["details"])})


def _require_newest(
    connection: sqlalchemy.Connection, model: str, actions: Sequence[str], expected: int
) -> None:
    query = AUDIT.select().where(AUDIT.c.model == model, AUDIT.c.action.in_(actions))
    newest = connection.execute(query.order_by(AUDIT.c.number.desc()).limit(1)).first()
    if (newest.number if newest else 0) != expected:
        author = f" by {newest.who} (entry {newest.number})" if newest else ""
        raise Conflict(
            f"{model} was changed meanwhile{author}; look at its current state and run the command again"
        )


def _broken(number: int) -> BrokenLog:
    return BrokenLog(f"the audit log was changed after it was written: see its entry {number}")


def _seal(previous_seal: str, values: Mapping[str, Any]) -> str:
    content = [previous_seal, *(values[name] for name in SEALED_COLUMNS)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
