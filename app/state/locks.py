"""Named locks between processes, held across several steps, on all machines that share the database."""

import contextlib
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy

from app.errors import UserError
from app.state import engine
from app.state.home import database_url, home, make_private

POLL_S = 0.2
"""Time between two attempts to take a lock that another process holds."""


class Busy(UserError):
    """Another process holds a lock."""


@contextlib.contextmanager
def exclusive(
    name: str, on_wait: Callable[[str], None] | None = None, *, wait: bool = True
) -> Iterator[None]:
    """Hold the lock `name` until the block ends. It is released if its holder dies.

    `on_wait` is called once with a message if another thread or process holds the lock. Raises Busy in that
    case if `wait` is false.
    """
    lock = _file_lock if database_url("production.db").startswith("sqlite") else _server_lock
    with lock(name) as try_take:
        holder = try_take()
        if holder is not None:
            if not wait:
                raise Busy(f"the lock {name} must be free, but {holder} holds it; try again later")
            if on_wait:
                on_wait(f"waiting for {holder}, which holds the lock {name}")
        while holder is not None:
            time.sleep(POLL_S)
            holder = try_take()
        yield


TryTake = Callable[[], str | None]
"""Function that tries to take a lock; returns its holder in words, or None if the caller has it."""


@contextlib.contextmanager
def _file_lock(name: str) -> Iterator[TryTake]:
    """A lock between the processes of one machine, which is enough for SQLite. The kernel releases it when
    its holder dies."""
    folder = make_private(home() / "locks")
    with (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("a+") as file:

        def try_take() -> str | None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                return file.read() or "another process"
            file.truncate(0)
            file.write(_this_process())
            file.flush()
            return None

        yield try_take


@contextlib.contextmanager
def _server_lock(name: str) -> Iterator[TryTake]:
    """An advisory lock of PostgreSQL, which releases it when the holder's connection ends."""
    # Without a pool: a connection that returns to a pool keeps its locks.
    server = engine.create(
        database_url("production.db"), poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT"
    )
    key = sqlalchemy.func.hashtextextended(f"alone: {name}", 0)
    try:
        with server.connect() as connection:

            def try_take() -> str | None:
                taken = connection.scalar(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_lock(key)))
                return None if taken else "another process"

            yield try_take
    finally:
        server.dispose()


def _this_process() -> str:
    """This process in words, for those who wait for it."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]])
    return f"process {os.getpid()} ({command[:60]})"
