"""What was deployed, promoted and changed, by whom: a log that is only added to. Each entry is sealed to the
one before it, and `app.state.audit_head` keeps the newest too, so that a change to what was written shows."""

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
from app.state.audit_head import Broken, Head
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


class Changed(UserError):
    """Somebody else has written since what a change was based on."""


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
        """Write an entry; returns when it is durable. `who` is the user of this process, if None.

        :param expected: write only if the model's newest entry with an action of `among` has this number (0:
            if it has none). Checked in the transaction that writes.
        :raises Changed: it has another one.
        """
        with self._engine.begin() as connection:
            database.begin_exclusively(connection, "audit")
            if expected is not None:
                _require_newest(connection, model, among, expected)
            last = connection.execute(AUDIT.select().order_by(AUDIT.c.number.desc()).limit(1)).first()
            number, before = (last.number + 1, last.seal) if last else (1, FIRST)
            values = {
                "number": number,
                "at": time.time(),
                "who": who or getpass.getuser(),
                "action": action,
                "model": model,
                "details": json.dumps(details, allow_nan=False),
            }
            values["seal"] = _seal(before, values)
            connection.execute(AUDIT.insert(), values)
        # It is written, whatever comes of the head; `entries` tells what is wrong with that.
        with contextlib.suppress(Broken, OSError):
            self._advance(audit_head.load(), _entry(values))
        return _entry(values)

    def _advance(self, kept: Head | None, newest: Entry) -> None:
        """Keep the newest entry as the head. Raises Broken if it is not chained to the one that was kept."""
        if kept is not None:
            since = AUDIT.select().where(AUDIT.c.number.between(kept.number, newest.number))
            with self._engine.connect() as connection:
                rows = connection.execute(since.order_by(AUDIT.c.number)).all()
            if not rows or (rows[0].number, rows[0].seal) != (kept.number, kept.seal):
                raise _broken(kept.number)
            for before, row in itertools.pairwise(rows):
                if row.number != before.number + 1 or _seal(before.seal, dict(row._mapping)) != row.seal:
                    raise _broken(row.number)
        audit_head.keep(Head(newest.number, newest.seal))

    def entries(
        self,
        model: str | None = None,
        action: str | None = None,
        *,
        expected: Head | None = None,
        since: Head | None = None,
    ) -> list[Entry]:
        """All entries, or those of a model or an action, the oldest first.

        Raises Broken if one was changed or removed: of those up to the head that this machine has kept, and
        up to `expected`, one that was kept elsewhere.

        :param since: an entry, to have only those after it. All are checked from the oldest of the given
            entries and the kept head on; if this machine has kept no head, from the first.
        """
        # Before the entries are read: one that is written meanwhile may become the head.
        kept = audit_head.load()
        due: dict[int, Head] = {}
        for head in (kept, expected, since):
            if head is not None and due.setdefault(head.number, head) != head:
                raise _broken(head.number)
        start = min(due) if kept and since else 0
        found, before, number = [], FIRST, start or 1
        with self._engine.connect() as connection:
            for row in connection.execute(
                AUDIT.select().where(AUDIT.c.number >= start).order_by(AUDIT.c.number)
            ):
                values = dict(row._mapping)
                # The one that is started from is proven by the head that it is, below.
                if row.number != number or (number != start and _seal(before, values) != row.seal):
                    raise _broken(number)
                head = due.pop(number, None)
                if head is not None and head.seal != row.seal:
                    raise _broken(number)
                before, number = row.seal, number + 1
                is_asked = model in (None, row.model) and action in (None, row.action)
                if is_asked and (since is None or row.number > since.number):
                    found.append(_entry(values))
        if due:
            raise Broken(
                f"the audit log ends before its entry {number}, but it had {max(due)}: entries were cut off "
                f"its end. If you restored the database from a backup, remove {audit_head.folder()}."
            )
        if number > 1:
            audit_head.keep(Head(number - 1, before))
        return found

    def head(self) -> Head | None:
        """The newest entry; None if there is none. Raises Broken if what was written since this machine has
        kept a head does not go on from that."""
        self.entries(since=audit_head.load())
        return audit_head.load()

    def last(self, model: str, actions: Sequence[str], until: float | None = None) -> Entry | None:
        """A model's newest entry with one of these actions, or the newest of those until a time (seconds
        since the epoch). The newest is the one written last, whatever the clocks said. Raises Broken if it
        was changed."""
        return next(self.backwards(model, actions, until), None)

    def backwards(
        self,
        model: str,
        actions: Sequence[str],
        until: float | None = None,
        *,
        since: Head | None = None,
    ) -> Iterator[Entry]:
        """A model's entries with these actions, the newest first, each checked: those up to a time, and after
        an entry, if they are given. Raises Broken."""
        query = AUDIT.select().where(AUDIT.c.model == model, AUDIT.c.action.in_(actions))
        if until is not None:
            query = query.where(AUDIT.c.at <= until)
        if since is not None:
            query = query.where(AUDIT.c.number > since.number)
        while (entry := self._checked(query.order_by(AUDIT.c.number.desc()).limit(1))) is not None:
            yield entry
            query = query.where(AUDIT.c.number < entry.number)

    def _checked(self, query: sqlalchemy.Select) -> Entry | None:
        """The entry that a query finds, if its seal is the one that it was written with."""
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            before = FIRST
            if row.number > 1:
                seals = sqlalchemy.select(AUDIT.c.seal).where(AUDIT.c.number == row.number - 1)
                before = str(connection.scalar(seals))
        values = dict(row._mapping)
        if _seal(before, values) != row.seal:
            raise _broken(row.number)
        return _entry(values)

    def close(self) -> None:
        self._engine.dispose()


def _entry(values: Mapping[str, Any]) -> Entry:
    return Entry(**{**values, "details": json.loads(values["details"])})


def _require_newest(
    connection: sqlalchemy.Connection, model: str, actions: Sequence[str], expected: int
) -> None:
    query = AUDIT.select().where(AUDIT.c.model == model, AUDIT.c.action.in_(actions))
    newest = connection.execute(query.order_by(AUDIT.c.number.desc()).limit(1)).first()
    if (newest.number if newest else 0) != expected:
        by = f" by {newest.who} (entry {newest.number})" if newest else ""
        raise Changed(f"{model} was changed meanwhile{by}; look at what holds now and give the command again")


def _broken(number: int) -> Broken:
    return Broken(f"the audit log is not what was written: see its entry {number}")


def _seal(before: str, values: Mapping[str, Any]) -> str:
    content = [before, *(values[name] for name in ("number", "at", "who", "action", "model", "details"))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
