"""Locks on a study: only one sweep at a time uses it, until its process releases the lock or dies."""

import fcntl
import os
import socket
from typing import Protocol

import sqlalchemy
from optuna.storages import RDBStorage

from app.errors import UserError
from app.state.home import home, make_private


class Lock(Protocol):
    """Excludes other sweeps from a study."""

    def acquire(self) -> None:
        """Take the lock. Raises UserError if another process has it."""

    def reacquire(self) -> None:
        """Take the lock again after the database was unreachable, because it may have lost the lock.

        Raises UserError as `acquire` does.
        """

    def close(self) -> None:
        """Release the lock, if it was acquired, and close its file or connection."""


def lock_of(name: str, storage: RDBStorage) -> Lock:
    """The lock of a study in this storage."""
    return _FileLock(name) if storage.url.startswith("sqlite") else _DatabaseLock(name, storage)


class _FileLock:
    """A lock on a file in the state directory, for SQLite; the kernel releases it if this process dies."""

    def __init__(self, name: str):
        self._name = name
        path = home() / "sweeps" / name / "lock"
        make_private(path.parent)
        self._file = path.open("a+")

    def acquire(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise _taken_error(self._name, self._file.read()) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def reacquire(self) -> None:
        """Do nothing: the kernel does not lose the lock."""

    def close(self) -> None:
        self._file.close()


class _DatabaseLock:
    """An advisory lock of PostgreSQL, which ends with its connection."""

    def __init__(self, name: str, storage: RDBStorage):
        self._name = name
        self._storage = storage
        self._connection: sqlalchemy.Connection | None = None

    def acquire(self) -> None:
        connection = self._storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._connection = connection
        lock = sqlalchemy.text("SELECT pg_try_advisory_lock(hashtext(:name))")
        if not connection.execute(lock, {"name": f"raylway {self._name}"}).scalar():
            raise _taken_error(self._name, "another process")

    def reacquire(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()  # a connection that is still open would keep the lock
            self._connection.close()
            self._connection = None
        self.acquire()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._storage.remove_session()
        self._storage.engine.dispose()  # a connection in the pool would keep the lock


def _taken_error(name: str, owner: str) -> UserError:
    return UserError(
        f"the study {name!r} is being swept by {owner or 'another process'}; wait for that one, stop it, or "
        f"start another study with --set sweep.study={name}-2"
    )
