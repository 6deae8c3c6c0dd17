"""Connections to SQL databases, SQLite or PostgreSQL, whose statements end within a time limit."""

from typing import Any

import sqlalchemy
from sqlalchemy import Dialect, Engine

STATEMENT_TIMEOUT_S = 30.0
"""Maximum duration of a statement, so that a server that never answers is an error."""
CLIENT_TIMEOUT_FACTOR = 1.5
"""Multiple of STATEMENT_TIMEOUT_S after which the client gives up on a server that does not answer."""


def create(url: str, **options: Any) -> Engine:
    """The engine of a database. `options` are those of SQLAlchemy, for PostgreSQL only."""
    if url.startswith("sqlite"):
        return _create_sqlite(url)
    return sqlalchemy.create_engine(url, pool_pre_ping=True, **options)


def _create_sqlite(url: str) -> Engine:
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": STATEMENT_TIMEOUT_S})

    @sqlalchemy.event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # With a write-ahead log, readers do not block writers; FULL commits survive a loss of power.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine


# For all engines of this process: MLflow and Optuna create theirs, which would wait without a limit.
@sqlalchemy.event.listens_for(Engine, "do_connect")
def _connect(dialect: Dialect, _record: Any, arguments: Any, options: Any) -> Any:
    if dialect.driver != "psycopg":
        return None  # SQLAlchemy connects
    return _connect_postgresql(*arguments, **options)


def _connect_postgresql(*arguments: Any, **options: Any) -> Any:
    """A connection to PostgreSQL whose statements are limited by the server, which then frees their locks,
    and by the client."""
    import psycopg
    from psycopg.errors import _WaitTimeout

    class LimitedConnection(psycopg.Connection):
        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return super().wait(gen, interval, timeout or CLIENT_TIMEOUT_FACTOR * STATEMENT_TIMEOUT_S)
            except _WaitTimeout:
                self.pgconn.finish()  # else a late answer would be read as the next statement's
                raise psycopg.OperationalError("the server does not answer") from None

    connection = LimitedConnection.connect(*arguments, **options)
    connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_S * 1000:.0f}")
    connection.commit()
    return connection


def reason(error: BaseException) -> str:
    """The first line of a database's error, without SQLAlchemy's wrapping."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
