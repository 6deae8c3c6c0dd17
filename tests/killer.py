"""Ends a command before one of its writes, as a loss of power would: for tests that give it again afterwards.

A write is whatever changes what others can see: a file opened for writing, renamed, linked or removed below
the watched folders, a folder made there, and a commit of SQL. To be killed before each of them in turn is to
be killed after each of them. What has a private name (see `app.state.files`) nobody sees.

`python -m tests.killer NUMBER LOG FOLDERS COMMAND...` does it to a command of Raylway; NUMBER 0 only notes
the writes in LOG. FOLDERS are separated by colons.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

WRITES = {"open", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
NOISE = (".lock", ".log", "-journal", "-wal", "-shm")
"""Endings of files whose writes are nothing to be finished: locks, logs, and what SQLite keeps for itself."""


class Watcher:
    """Counts the writes of this process; kills it before the one with a number (from 1).

    `private` counts what has a private name too.
    """

    def __init__(
        self, folders: Sequence[Path], kill_before: int = 0, log: Path | None = None, *, private: bool = False
    ):
        self._folders = folders
        self._private = private
        self._kill_before = kill_before
        self._log = log
        self._lines: IO[str] | None = None
        self._count = 0
        self._changes: dict[int, Any] = {}

    def install(self) -> None:
        """Begin to watch; it cannot be ended."""
        import sqlalchemy

        if self._log is not None:
            self._lines = self._log.open("a", buffering=1)
        sys.addaudithook(self._hear)
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", self._commit)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES:
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        for argument in arguments[:2]:
            if isinstance(argument, bytes | str | os.PathLike):
                path = Path(os.fsdecode(argument)).absolute()
                if self._is_seen(path) and not (event == "os.mkdir" and path.is_dir()):
                    self._write(event, str(path))
                    return

    def _is_seen(self, path: Path) -> bool:
        folder = next((folder for folder in self._folders if path.is_relative_to(folder)), None)
        if folder is None or path.name.endswith(NOISE):
            return False
        parts = path.relative_to(folder).parts
        is_private = any(part.startswith(".") for part in parts)
        return parts[:1] not in (("logs",), ("ray",)) and (self._private or not is_private)

    def _commit(self, connection: Any) -> None:
        database = connection.connection.dbapi_connection
        changes = getattr(database, "total_changes", None)  # of SQLite: what only reads is committed too
        if changes is None or changes != self._changes.get(id(database), 0):
            self._changes[id(database)] = changes
            self._write("commit", str(connection.engine.url))

    def _write(self, event: str, name: str) -> None:
        self._count += 1
        if self._lines is not None:
            self._lines.write(json.dumps([event, name]) + "\n")
        if self._count == self._kill_before:
            os.kill(os.getpid(), signal.SIGKILL)


def fork(call: Callable[[], Any], watcher: Watcher | None = None) -> Any:
    """What a call returns (a JSON value) in a process of its own; None if the watcher killed it.

    Raises AssertionError with its traceback if the call raises.
    """
    return _end(*_begin(call, watcher), watcher)


def fork_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Like `fork` for several calls at once."""
    begun = [_begin(call, None) for call in calls]
    return [_end(*each, None) for each in begun]


def _begin(call: Callable[[], Any], watcher: Watcher | None) -> tuple[int, int]:
    """Returns the process, and what it writes its answer to."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        if watcher is not None:
            watcher.install()
        os.write(writer, json.dumps(call()).encode())
        status = 0
    except BaseException:
        os.write(writer, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _end(pid: int, reader: int, watcher: Watcher | None) -> Any:
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert watcher is not None
        return None
    assert os.WEXITSTATUS(status) == 0, said
    return json.loads(said)


def writes(log: Path) -> list[tuple[str, str]]:
    """The writes in a log: what was done, and to which file."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def main(number: str, log: str, folders: str, *command: str) -> None:
    Watcher([Path(folder) for folder in folders.split(":")], int(number), Path(log)).install()
    sys.argv = ["raylway", *command]
    from app.cli import main

    main.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
