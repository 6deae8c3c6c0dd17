"""The SQL database of production (predictions, feedback, the audit log): SQLite in the state directory, or
PostgreSQL."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy import Column, Connection, Integer, MetaData, String, Table

from app.errors import UserError
from app.state import engine, locks
from app.state.home import database_url, home, private_file

TABLES = MetaData()
"""Tables without versions; each module adds its own."""
VERSIONS = Table(
    "schema_versions",
    TABLES,
    Column("part", String(32), primary_key=True),
    Column("version", Integer, nullable=False),
)


@dataclass(frozen=True)
class Part:
    """Tables whose schema has versions, which change together."""

    name: str
    tables: MetaData
    migrations: Sequence[Callable[[Connection], None]]
    """Steps from version 1 to 2, from 2 to 3, and so on. Each runs in the transaction that stores
    the new version."""

    @property
    def latest_version(self) -> int:
        return 1 + len(self.migrations)


class Database:
    """A pool of connections; safe to use from several threads.

    It connects at the first use, so that a process can start while the database is unavailable. The first
    transaction creates the tables, or migrates them to this code's version.
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self._engine = engine.create(database_url("production.db"))
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
        """Close the connections."""
        self._engine.dispose()

    def _prepare(self) -> None:
        """Create or migrate the tables, once."""
        if self._is_current:
            return
        with self._preparing:
            if self._is_current:
                return
            is_file = self._engine.dialect.name == "sqlite"
            with _opening_file(self._engine.url.database) if is_file else contextlib.nullcontext():
                with self._engine.connect() as connection:
                    is_current = self._is_up_to_date(connection)
                if not is_current:
                    with self._engine.begin() as connection:
                        begin_exclusively(connection, "schema")
                        self._migrate(connection)
            self._is_current = True

    def _is_up_to_date(self, connection: Connection) -> bool:
        """Whether every table exists in this code's version. Takes no lock: usually nothing is to be done."""
        existing = set(sqlalchemy.inspect(connection).get_table_names())
        required = set(TABLES.tables).union(*(part.tables.tables for part in self._parts))
        return required <= existing and all(
            _stored_version(connection, part) == part.latest_version for part in self._parts
        )

    def _migrate(self, connection: Connection) -> None:
        VERSIONS.create(connection, checkfirst=True)
        for part in self._parts:
            version, latest = _stored_version(connection, part), part.latest_version
            if version is None:
                names = sqlalchemy.inspect(connection).get_table_names()
                version = latest if set(part.tables.tables).isdisjoint(names) else 1
                connection.execute(VERSIONS.insert(), {"part": part.name, "version": latest})
            if version > latest:
                raise UserError(
                    f"the database's {part.name} have version {version}, written by a newer Raylway; this "
                    f"one supports versions up to {latest}. Use the newer one."
                )
            for migrate in part.migrations[version - 1 :]:
                migrate(connection)
            connection.execute(VERSIONS.update().where(VERSIONS.c.part == part.name), {"version": latest})
            part.tables.create_all(connection)
        TABLES.create_all(connection)


def connect(*parts: Part) -> Database:
    """The database with all TABLES and the tables of `parts`."""
    return Database(parts)


def begin_exclusively(connection: Connection, name: str) -> None:
    """Let no other transaction that calls this with the same `name` run until this one ends."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        key = sqlalchemy.func.hashtextextended(name, 0)
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(key)))


def _stored_version(connection: Connection, part: Part) -> int | None:
    query = sqlalchemy.select(VERSIONS.c.version).where(VERSIONS.c.part == part.name)
    return connection.execute(query).scalar()


@contextlib.contextmanager
def _opening_file(file: str | None) -> Iterator[None]:
    """Let one process at a time open a SQLite file for the first time, and create it for its owner alone.

    Two processes that switch its journal to WAL at once would fail.
    """
    if file and Path(file).is_relative_to(home()):
        private_file(Path(file))
    with locks.exclusive("open"):
        yield
