"""Kills a command before one of its writes, as a loss of power would; tests then run the command again.

A write is a change that other processes can see: opening a file for writing, renaming, linking or removing
it, and creating a folder, all below the watched folders; and a commit of SQL. A kill after a write is a kill
before the next one. Other processes ignore private names (see `app.state.files`), so these do not count.

`python -m tests.killer NUMBER LOG FOLDERS COMMAND...` kills a command of Raylway before its write NUMBER;
with 0, the command runs to its end. LOG gets the writes. FOLDERS are separated by colons.
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
"""Endings of files whose writes do not count: locks, logs, and SQLite's own files."""


class Watcher:
    """Counts the writes of this process, and kills it before write number `kill_before` (from 1; 0: never).

    With `private`, writes of files with private names count too.
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
        """Start to watch. It cannot be stopped."""
        import sqlalchemy

        if self._log is not None:
            self._lines = self._log.open("a", buffering=1)
        sys.addaudithook(self._on_audit_event)
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", self._on_commit)

    def _on_audit_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES:
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        for argument in arguments[:2]:
            if isinstance(argument, bytes | str | os.PathLike):
                path = Path(os.fsdecode(argument)).absolute()
                if self._counts(path) and not (event == "os.mkdir" and path.is_dir()):
                    self._write(event, str(path))
                    return

    def _counts(self, path: Path) -> bool:
        """Whether a write of this path counts."""
        folder = next((folder for folder in self._folders if path.is_relative_to(folder)), None)
        if folder is None or path.name.endswith(NOISE):
            return False
        parts = path.relative_to(folder).parts
        is_private = any(part.startswith(".") for part in parts)
        return parts[:1] not in (("logs",), ("ray",)) and (self._private or not is_private)

    def _on_commit(self, connection: Any) -> None:
        database = connection.connection.dbapi_connection
        changes = getattr(database, "total_changes", None)  # SQLite also commits transactions that only read
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
    """Run a call in a forked process. Returns its result (a JSON value), or None if the watcher killed it.

    Raises AssertionError with the traceback if the call raises.
    """
    return _wait(*_start(call, watcher), watcher)


def fork_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Like `fork` for several calls at once."""
    started = [_start(call, None) for call in calls]
    return [_wait(pid, reader, None) for pid, reader in started]


def _start(call: Callable[[], Any], watcher: Watcher | None) -> tuple[int, int]:
    """Fork a process for the call. Returns its id, and the file descriptor from which to read its result."""
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


def _wait(pid: int, reader: int, watcher: Watcher | None) -> Any:
    with os.fdopen(reader, "rb") as stream:
        output = stream.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert watcher is not None
        return None
    assert os.WEXITSTATUS(status) == 0, output
    return json.loads(output)


def writes(log: Path) -> list[tuple[str, str]]:
    """The writes in a log, each as event and file."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def main(number: str, log: str, folders: str, *command: str) -> None:
    Watcher([Path(folder) for folder in folders.split(":")], int(number), Path(log)).install()
    sys.argv = ["raylway", *command]
    from app.cli import main

    main.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
