"""Reaching MLflow, whose tables are in the state directory or in PostgreSQL."""

import functools
import logging
from pathlib import Path

import sqlalchemy
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from app.state import engine, files
from app.state.home import database_url, home, make_private, private_file

BUSY_TIMEOUT_S = 60


def uri() -> str:
    """Where MLflow keeps its tables."""
    url = database_url("mlflow.db")
    # Several commands write at once; SQLite's driver would give up after 5 s.
    return f"{url}?timeout={BUSY_TIMEOUT_S}" if url.startswith("sqlite") else url


def client() -> MlflowClient:
    """A client of our MLflow, whose tables are made at the first call."""
    make_private(home() / "artifacts")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    file = home() / "mlflow.db"
    if not uri().startswith("sqlite"):
        _require_answer(uri())
    elif not file.exists():
        _make_tables(file)
    return MlflowClient(tracking_uri=uri(), registry_uri=uri())


@functools.cache
def _require_answer(url: str) -> None:
    """Raise what a first connection does: MLflow would try again for minutes, without a word."""
    with engine.create(url, poolclass=sqlalchemy.NullPool).connect():
        pass


def _make_tables(file: Path) -> None:
    """MLflow makes its tables in many steps, and a file with some of them is of no use to it."""
    with files.locked(file):
        if file.exists():
            return
        draft = private_file(files.private_path(file))
        SqlAlchemyStore(f"sqlite:///{draft}", str(home() / "artifacts")).engine.dispose()
        draft.rename(file)
