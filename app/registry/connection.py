"""The connection to MLflow, whose tables are in the state directory or in PostgreSQL."""

import functools
import logging
from pathlib import Path

import sqlalchemy
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from app.state import engine, files
from app.state.home import database_url, home, make_private, private_file

BUSY_TIMEOUT_S = 60
"""Maximum wait for a locked SQLite database, for several commands that write at once; the driver's default is
5 s."""


def uri() -> str:
    """The URI of MLflow's tables."""
    url = database_url("mlflow.db")
    return f"{url}?timeout={BUSY_TIMEOUT_S}" if url.startswith("sqlite") else url


def client() -> MlflowClient:
    """A client of MLflow. The first call creates the tables."""
    make_private(home() / "artifacts")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    file = home() / "mlflow.db"
    if not uri().startswith("sqlite"):
        _require_connection(uri())
    elif not file.exists():
        _create_tables(file)
    return MlflowClient(tracking_uri=uri(), registry_uri=uri())


@functools.cache
def _require_connection(url: str) -> None:
    """Raises SQLAlchemyError if a first connection fails: MLflow would retry for minutes, silently."""
    with engine.create(url, poolclass=sqlalchemy.NullPool).connect():
        pass


def _create_tables(file: Path) -> None:
    """Create MLflow's tables in one step: MLflow needs many, and rejects a file that has only some tables."""
    with files.locked(file):
        if file.exists():
            return
        with files.atomic(file) as draft:
            private_file(draft)
            SqlAlchemyStore(f"sqlite:///{draft}", str(home() / "artifacts")).engine.dispose()
