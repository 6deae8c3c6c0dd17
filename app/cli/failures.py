"""Messages for failures of the disk, a database or the cluster: what must hold, what came, and what to do.

Exceptions are recognised by the names of their classes, since their libraries take seconds to import.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator

from app.errors import UserError
from app.state.home import home

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
AGAIN = "run the command again: it continues where it stopped"
DATABASES = ("production.db", "mlflow.db", "optuna.db")
"""SQLite files in the state directory."""
LOST_PROCESS_ERRORS = frozenset(
    f"ray.exceptions.{name}"
    for name in (
        "ActorDiedError",
        "ActorUnavailableError",
        "LocalRayletDiedError",
        "NodeDiedError",
        "ObjectLostError",
        "OutOfMemoryError",
        "OwnerDiedError",
        "RaySystemError",
        "RpcError",
        "WorkerCrashedError",
    )
)
"""Exceptions that Ray raises when one of its processes ends unexpectedly."""


def explain(error: BaseException) -> str | None:
    """Message for an error of disk, database or cluster; None for any other error."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return None
        if isinstance(cause, OSError) and (message := _file_message(cause)):
            return message
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(cause).__mro__}
        if "sqlite3.DatabaseError" in kinds:
            return _sqlite_message(str(cause))
        if "psycopg.OperationalError" in kinds:
            return (
                "RAYLWAY_DATABASE_URL: must name a PostgreSQL server that answers, but: "
                f"{_first_line(cause)}. Check the address and that the server is up, and {AGAIN}"
            )
        if "mlflow.exceptions.MlflowException" in kinds and "database schema" in str(cause):
            return (
                "MLflow's tables must be those of the MLflow in this environment, but another version wrote "
                "them. If it was newer, use the newer Raylway; if it was older, take a backup and run "
                f"`mlflow db upgrade` on them ({_first_line(cause).partition('. ')[0]})"
            )
        if kinds & LOST_PROCESS_ERRORS:
            return (
                "the processes of the Ray cluster must run while a command runs, but one ended: "
                f"{type(cause).__name__}: {_first_line(cause)} See the log; if the cluster is gone or memory "
                f"ran out, correct that, and {AGAIN}"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, including those that Ray and MLflow wrap."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__


def _file_message(error: OSError) -> str | None:
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if error.errno in FULL:
        return f"{file or 'the disk'}: must have space left, but: {error.strerror}. Free some, and {AGAIN}"
    if home().exists() and not home().is_dir():
        return f"RAYLWAY_HOME: must be a folder; {home()} is not. Set another one"
    if file is None or error.errno not in DENIED:
        return None
    if file == str(home()) or file.startswith(f"{home()}{os.sep}"):
        return (
            f"RAYLWAY_HOME: must be a folder that you can write to; it is {home()}, but: {file}: "
            f"{error.strerror}. Set another one, or change its mode"
        )
    return f"{file}: must be accessible, but: {error.strerror}. Change its mode, or use another path"


def _sqlite_message(message: str) -> str | None:
    if "disk is full" in message:
        return f"{home()}: must have space left for its databases, but: {message}. Free some, and {AGAIN}"
    if "disk I/O error" in message:  # a full disk is one of its reasons
        return (
            f"{home()}: must be on a disk that works and has space left, but: {message}. Check the disk, "
            f"and {AGAIN}"
        )
    if "readonly" in message or "unable to open" in message:
        return f"RAYLWAY_HOME: must be a folder that you can write to; it is {home()}, but: {message}"
    if "not a database" in message or "malformed" in message:
        files = [str(home() / name) for name in DATABASES if _is_damaged(name)]
        damaged = ", ".join(files) or f"one of {', '.join(DATABASES)} in {home()}"
        return f"{damaged}: must be a SQLite database, but: {message}. Restore it from a backup"
    if "locked" in message:
        return f"{home()}: another process keeps one of its databases locked ({message}); wait, and {AGAIN}"
    return None


def _is_damaged(name: str) -> bool:
    file = home() / name
    try:
        connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
        try:
            return connection.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return file.exists()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
