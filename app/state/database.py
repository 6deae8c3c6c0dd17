"""The SQL database of what happens in production: SQLite in the state directory, or PostgreSQL; and locks
that its users hold across several steps."""

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Column, Connection, Dialect, Engine, Integer, MetaData, NullPool, String, Table

from app.errors import UserError
from app.state.home import database_url, home, make_private, private_file

TABLES = MetaData()
"""Each module that keeps something in the database adds its tables, but for those of a Part."""
VERSIONS = Table(
    "schema_versions",
    TABLES,
    Column("part", String(32), primary_key=True),
    Column("version", Integer, nullable=False),
)
STATEMENT_TIMEOUT_S = 30.0
"""Longest time that a statement may take. A server that accepts and never answers fails after it."""
POLL_S = 0.2
"""How often a lock that somebody else holds is tried again."""


class Busy(UserError):
    """Somebody else holds a lock."""


@dataclass(frozen=True)
class Part:
    """Tables that change their form together."""

    name: str
    tables: MetaData
    migrations: Sequence[Callable[[Connection], None]]
    """The step from version 1 to 2, from 2 to 3, and so on. Each runs in the transaction that counts it."""


class Database:
    """A pool of connections; safe to use from several threads.

    Nothing is opened before the first use, so a process can start while the database is away. The tables are
    made, or brought to this code's form, in the first transaction that succeeds.
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self._engine = engine(database_url("production.db"))
        self._is_current = False
        self._preparing = threading.Lock()

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction: committed at the end of the block, rolled back if it raises."""
        self._prepare()
        with self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection for reading."""
        self._prepare()
        with self._engine.connect() as connection:
            yield connection

    def dispose(self) -> None:
        self._engine.dispose()

    def _prepare(self) -> None:
        if self._is_current:
            return
        with self._preparing:
            if self._is_current:
                return
            is_file = self._engine.dialect.name == "sqlite"
            with _first_to_open(self._engine.url.database) if is_file else contextlib.nullcontext():
                with self._engine.connect() as connection:
                    is_current = self._has_all(connection)
                if not is_current:
                    with self._engine.begin() as connection:
                        begin_exclusively(connection, "schema")
                        self._upgrade(connection)
            self._is_current = True

    def _has_all(self, connection: Connection) -> bool:
        """Whether every table is there in this code's form; asked without a lock, as mostly it is."""
        names = set(sqlalchemy.inspect(connection).get_table_names())
        wanted = set(TABLES.tables).union(*(part.tables.tables for part in self._parts))
        return wanted <= names and all(_version(connection, part) == _latest(part) for part in self._parts)

    def _upgrade(self, connection: Connection) -> None:
        VERSIONS.create(connection, checkfirst=True)
        for part in self._parts:
            version, latest = _version(connection, part), _latest(part)
            if version is None:
                names = sqlalchemy.inspect(connection).get_table_names()
                version = latest if set(part.tables.tables).isdisjoint(names) else 1
                connection.execute(VERSIONS.insert(), {"part": part.name, "version": latest})
            if version > latest:
                raise UserError(
                    f"the database's {part.name} have version {version}, written by a newer Raylway; this "
                    f"one knows versions up to {latest}. Use the newer one."
                )
            for migrate in part.migrations[version - 1 :]:
                migrate(connection)
            connection.execute(VERSIONS.update().where(VERSIONS.c.part == part.name), {"version": latest})
            part.tables.create_all(connection)
        TABLES.create_all(connection)


def connect(*parts: Part) -> Database:
    """The database, with all TABLES once it is used, and `parts` in this code's form."""
    return Database(parts)


def begin_exclusively(connection: Connection, name: str) -> None:
    """Until the transaction ends, nobody else is between this and its end with the same `name`."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        key = sqlalchemy.func.hashtextextended(name, 0)
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(key)))


@contextlib.contextmanager
def alone(name: str, on_wait: Callable[[str], None] | None = None, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `name` until the block ends: one thread of one process at a time, on all machines that
    share the database. It is free again when its holder dies.

    :param on_wait: told once who holds the lock, if somebody does.
    :raises Busy: somebody holds the lock, and not `wait`.
    """
    locked = _locked_by_file if database_url("production.db").startswith("sqlite") else _locked_by_server
    with locked(name) as attempt:
        holder = attempt()
        if holder is not None:
            message = f"waiting for {holder}, which is changing the same ({name})"
            if not wait:
                raise Busy(message.removeprefix("waiting for ") + "; try again later")
            if on_wait:
                on_wait(message)
        while holder is not None:
            time.sleep(POLL_S)
            holder = attempt()
        yield


Attempt = Callable[[], str | None]
"""Tries to take a lock; returns who holds it, or None if it is ours now."""


@contextlib.contextmanager
def _locked_by_file(name: str) -> Iterator[Attempt]:
    """SQLite is on one machine, so a file's lock is enough; the kernel frees it when the holder dies."""
    folder = make_private(home() / "locks")
    with (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("a+") as file:

        def attempt() -> str | None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                return file.read() or "another process"
            file.truncate(0)
            file.write(_described())
            file.flush()
            return None

        yield attempt


@contextlib.contextmanager
def _locked_by_server(name: str) -> Iterator[Attempt]:
    """PostgreSQL frees an advisory lock when the holder's connection ends."""
    # Without a pool: a connection that goes back to one keeps its locks.
    server = engine(database_url("production.db"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    key = sqlalchemy.func.hashtextextended(f"alone: {name}", 0)
    try:
        with server.connect() as connection:

            def attempt() -> str | None:
                ours = connection.scalar(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_lock(key)))
                return None if ours else "another process"

            yield attempt
    finally:
        server.dispose()


def _described() -> str:
    """This process, for those who wait for it."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]])
    return f"process {os.getpid()} ({command[:60]})"


def _version(connection: Connection, part: Part) -> int | None:
    query = sqlalchemy.select(VERSIONS.c.version).where(VERSIONS.c.part == part.name)
    return connection.execute(query).scalar()


def _latest(part: Part) -> int:
    return 1 + len(part.migrations)


def reason(error: BaseException) -> str:
    """The first line of an error of the database, without SQLAlchemy's wrapping."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def engine(url: str, **options: Any) -> Engine:
    """What opens connections to a database, SQLite or PostgreSQL."""
    if url.startswith("sqlite"):
        return _sqlite(url)
    return sqlalchemy.create_engine(url, pool_pre_ping=True, **options)


@sqlalchemy.event.listens_for(Engine, "do_connect")
def _open(dialect: Dialect, _record: Any, arguments: Any, options: Any) -> Any:
    """Of all engines of this process: MLflow and Optuna make theirs, and would wait for ever."""
    if dialect.driver != "psycopg":
        return None  # SQLAlchemy opens it
    return _bounded_connection(*arguments, **options)


def _bounded_connection(*arguments: Any, **options: Any) -> Any:
    """A connection to PostgreSQL whose statements end within STATEMENT_TIMEOUT_S, on both sides.

    The server's own limit frees its locks; ours is for a server that does not answer at all.
    """
    import psycopg
    from psycopg.errors import _WaitTimeout

    class Bounded(psycopg.Connection):
        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return super().wait(gen, interval, timeout or 1.5 * STATEMENT_TIMEOUT_S)
            except _WaitTimeout:
                self.pgconn.finish()  # what it would answer now is unknown
                raise psycopg.OperationalError("the server does not answer") from None

    connection = Bounded.connect(*arguments, **options)
    connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_S * 1000:.0f}")
    connection.commit()
    return connection


@contextlib.contextmanager
def _first_to_open(file: str | None) -> Iterator[None]:
    """Let one process at a time open a SQLite file for the first time; make it for its owner alone.

    Two that turn its journal to WAL at once would fail.
    """
    if file and Path(file).is_relative_to(home()):
        private_file(Path(file))
    with alone("open"):
        yield


def _sqlite(url: str) -> Engine:
    file = sqlalchemy.create_engine(url, connect_args={"timeout": STATEMENT_TIMEOUT_S})

    @sqlalchemy.event.listens_for(file, "connect")
    def prepare(connection: Any, _: Any) -> None:
        # Readers do not stop writers, and what is committed survives a loss of power.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return file
