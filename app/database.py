"""The SQL database of what happens in production: SQLite in the state directory, or PostgreSQL."""

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy
from sqlalchemy import Engine, MetaData
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from app import files
from app.home import database_url, home

TABLES = MetaData()
"""Each module that keeps something there adds its tables."""


def connect() -> Engine:
    """The database, with all TABLES made; safe to use from several threads."""
    home().mkdir(parents=True, exist_ok=True)
    url = database_url("production.db")
    engine = _sqlite(url) if url.startswith("sqlite") else sqlalchemy.create_engine(url, pool_pre_ping=True)
    try:
        TABLES.create_all(engine)
    except (IntegrityError, OperationalError, ProgrammingError):
        TABLES.create_all(engine)  # somebody else was making them
    return engine


def begin_exclusively(connection: sqlalchemy.Connection, name: str) -> None:
    """Until the transaction ends, nobody else is between this and its end with the same `name`."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        key = sqlalchemy.func.hashtextextended(name, 0)
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(key)))


@contextlib.contextmanager
def exclusively(name: str) -> Iterator[None]:
    """Until the block ends, no other process is in one with the same `name`; for changes that no single
    transaction holds. It is released if this process is killed."""
    url = database_url("production.db")
    if url.startswith("sqlite"):
        with files.locked(home() / "locks" / name):
            yield
        return
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        begin_exclusively(connection, name)
        yield


def _sqlite(url: str) -> Engine:
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": 30})

    @sqlalchemy.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        # Readers do not stop writers, and what is committed survives a loss of power.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine
