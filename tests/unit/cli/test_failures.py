"""Messages for failures of the disk, a database or the cluster."""

import errno
import os
import pickle
import sqlite3
from pathlib import Path

import pytest
import ray.exceptions
import sqlalchemy
from mlflow.exceptions import MlflowException

from app.cli.failures import explain
from app.errors import UserError
from app.state.audit import Audit
from tests.commands import raylway


def failed(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


def wrapped(error: Exception, by: type[Exception] = RuntimeError) -> Exception:
    """An error as a library raises it from another one."""
    outer = by("outer")
    outer.__cause__ = error
    return outer


def in_a_worker(error: Exception) -> Exception:
    """An error of a task as Ray raises it in the driver."""
    raised = ray.exceptions.RayTaskError("read", "Traceback ...", error)
    return pickle.loads(pickle.dumps(raised)).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (failed(errno.ENOSPC, "/x/y"), "/x/y: must have space left, but: No space left on device. Free some"),
        (failed(errno.ENOSPC), "the disk: must have space left, but: "),
        (wrapped(failed(errno.EDQUOT, "/x")), "/x: must have space left, but: Disk quota exceeded"),
        (in_a_worker(failed(errno.ENOSPC, "/x")), "/x: must have space left"),
        (
            failed(errno.EACCES, "/etc/x"),
            "/etc/x: must be accessible, but: Permission denied. Change its mode",
        ),
        (
            sqlite3.OperationalError("database or disk is full"),
            "must have space left for its databases, but: ",
        ),
        (
            sqlite3.OperationalError("disk I/O error"),
            "must be on a disk that works and has space left, but: ",
        ),
        (
            sqlite3.OperationalError("attempt to write a readonly database"),
            "RAYLWAY_HOME: must be a folder that",
        ),
        (
            sqlite3.OperationalError("unable to open database file"),
            "RAYLWAY_HOME: must be a folder that you can",
        ),
        (sqlite3.OperationalError("database is locked"), "another process keeps one of its databases locked"),
        (
            MlflowException("Detected out-of-date database schema (found version a, but expected b). Take a"),
            "MLflow's tables must be those of the MLflow in this environment, but another version wrote",
        ),
        (
            ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMore"),
            "but one ended: OutOfMemoryError: Task was killed due to the node running low on memory. See",
        ),
        (
            ray.exceptions.NodeDiedError("node x"),
            "the Ray cluster must run while a command runs, but one ended",
        ),
    ],
)
def test_a_failure_is_reported_with_advice(error, text):
    message = explain(error)
    assert message is not None
    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        wrapped(KeyError("x")),
        in_a_worker(KeyError("x")),
        failed(errno.ENOENT, "/x"),
        sqlite3.OperationalError("no such table: x"),
        sqlite3.IntegrityError("UNIQUE constraint failed"),
        MlflowException("anything else"),
        wrapped(UserError("for the user")),
    ],
)
def test_other_errors_have_no_message(error):
    assert explain(error) is None


def test_an_error_that_was_handled_before_is_not_a_cause():
    defect = KeyError("ours")
    defect.__context__ = failed(errno.EACCES, "/x")
    assert explain(defect) is None


def test_the_message_for_the_state_directory_names_its_variable(home):
    message = explain(failed(errno.EROFS, str(home / "logs" / "x")))
    assert message == (
        f"RAYLWAY_HOME: must be a folder that you can write to; it is {home}, but: {home}/logs/x: Read-only "
        "file system. Set another one, or change its mode"
    )


def test_the_password_of_a_server_is_not_shown():
    engine = sqlalchemy.create_engine("postgresql+psycopg://nobody:secret@127.0.0.1:1/none")
    with pytest.raises(sqlalchemy.exc.OperationalError) as caught:
        engine.connect()
    message = explain(caught.value)
    assert message is not None
    assert message.startswith("RAYLWAY_DATABASE_URL: must name a PostgreSQL server that answers, but: ")
    assert "secret" not in message


def overwrite_pages(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * 3 * 4096)


@pytest.mark.parametrize("damage_file", [lambda file: file.write_bytes(b"x" * 20_000), overwrite_pages])
def test_a_damaged_database_is_named(home, damage_file):
    with Audit() as audit:
        audit.add("sign", "income", {"version": "1"})
    (home / "mlflow.db").write_bytes((home / "production.db").read_bytes())
    damage_file(home / "production.db")
    with Audit() as audit, pytest.raises(sqlalchemy.exc.DatabaseError) as caught:
        audit.entries()
    message = explain(caught.value)
    assert message is not None
    assert message.startswith(f"{home}/production.db: must be a SQLite database, but: ")


@pytest.mark.parametrize("command", ["audit", "up", "down", "token x"])
def test_a_state_directory_that_is_a_file_is_refused_with_one_line(home, command):
    home.write_text("")
    done = raylway(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: RAYLWAY_HOME: must be a folder; {home} is not. Set another one\n"


def test_a_failure_of_a_command_is_printed_and_logged(home):
    home.mkdir()
    (home / "production.db").write_bytes(b"x" * 20_000)
    done = raylway("audit")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {home}/production.db: must be a SQLite database, but: ")
    (log,) = (home / "logs").iterdir()
    assert "Traceback" in log.read_text()
