"""Faults of what a command stands on (disk, databases, cluster), told as all our errors: what must hold, what
came, and what to do. Known by the names of their classes: their libraries take seconds to import."""

import errno
import os
import sqlite3
from collections.abc import Iterator

from app.errors import UserError
from app.state.home import home

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
AGAIN = "give the command again: it goes on with what is done"
DATABASES = ("production.db", "mlflow.db", "optuna.db")
"""SQLite's files in the state directory."""
LOST = frozenset(
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
"""What Ray raises when its processes end before they should."""


def explained(error: BaseException) -> str | None:
    """What is wrong with the surroundings, and what to do; None if the error is of another kind."""
    for each in _chain(error):
        if isinstance(each, UserError):
            return None
        if isinstance(each, OSError) and (text := _of_files(each)):
            return text
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(each).__mro__}
        if "sqlite3.DatabaseError" in kinds:
            return _of_sqlite(str(each))
        if "psycopg.OperationalError" in kinds:
            return (
                "RAYLWAY_DATABASE_URL: must name a PostgreSQL server that answers, but: "
                f"{_first_line(each)}. Check the address and that the server is up, and {AGAIN}"
            )
        if "mlflow.exceptions.MlflowException" in kinds and "database schema" in str(each):
            return (
                "MLflow's tables must be those of the MLflow in this environment, but another version wrote "
                "them. If that was a newer one, use the newer Raylway; if it was an older one, take a backup "
                f"and run `mlflow db upgrade` on them ({_first_line(each).partition('. ')[0]})"
            )
        if kinds & LOST:
            return (
                "the processes of the Ray cluster must go on while a command runs, but one ended: "
                f"{type(each).__name__}: {_first_line(each)} See the log; if memory or the cluster is gone, "
                f"put that right, and {AGAIN}"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from; what Ray and MLflow wrap is in it too."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__


def _of_files(error: OSError) -> str | None:
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if error.errno in FULL:
        return f"{where or 'the disk'}: must have space left, but: {error.strerror}. Free some, and {AGAIN}"
    if home().exists() and not home().is_dir():
        return f"RAYLWAY_HOME: must be a folder; {home()} is none. Name another one"
    if where is None or error.errno not in DENIED:
        return None
    if where == str(home()) or where.startswith(f"{home()}{os.sep}"):
        return (
            f"RAYLWAY_HOME: must be a folder that you can write to; it is {home()}, but: {where}: "
            f"{error.strerror}. Name another one, or change its mode"
        )
    return f"{where}: cannot be used: {error.strerror}. Change its mode, or name another place"


def _of_sqlite(message: str) -> str | None:
    if "disk is full" in message:
        return f"{home()}: must have space left for its databases, but: {message}. Free some, and {AGAIN}"
    if "disk I/O error" in message:  # a full disk among other reasons
        return (
            f"{home()}: must be on a disk that works and has space left, but: {message}. Look at the disk, "
            f"and {AGAIN}"
        )
    if "readonly" in message or "unable to open" in message:
        return f"RAYLWAY_HOME: must be a folder that you can write to; it is {home()}, but: {message}"
    if "not a database" in message or "malformed" in message:
        files = [str(home() / name) for name in DATABASES if _is_damaged(name)]
        which = ", ".join(files) or f"one of {', '.join(DATABASES)} in {home()}"
        return f"{which}: must be a SQLite database, but: {message}. Restore it from a backup"
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
