"""Runs commands of Raylway in forks of one process that has imported everything.

Importing Ray, PyTorch and MLflow takes a command four seconds. Here one process imports them, with the same
environment variables as a command, and forks for each command. Other tests start `python -m app` themselves,
which shows that a command also runs without this server.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120.0
"""Maximum time for the imports, and for a fork."""


class Process:
    """A running command; like subprocess.Popen, but the end of a `with` block kills it."""

    def __init__(self, arguments: Sequence[str], connection: socket.socket, stdout: IO[str] | None = None):
        self._arguments = list(arguments)
        self._connection = connection
        self._answers = connection.makefile()
        self.stdout = stdout
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._connection.settimeout(timeout_s)
            try:
                self.returncode = int(self._answers.readline())
            except TimeoutError:
                raise subprocess.TimeoutExpired(self._arguments, timeout_s) from None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.returncode is None:
            self.kill()
        self._answers.close()
        self._connection.close()
        if self.stdout:
            self.stdout.close()


class CommandServer:
    """A process that forks for each command. It ends with `close`, or with the process that created it."""

    def __init__(self, env: Mapping[str, str], folder: Path):
        self._path = str(folder / "server.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._path)
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.command_server", str(listener.fileno())],
                cwd=ROOT, env=dict(env), pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
            )  # fmt: skip

    def start(self, arguments: Sequence[str], env: Mapping[str, str]) -> Process:
        """Start a command; its output and errors both go to `stdout`."""
        reader, writer = os.pipe()
        connection = self._request(arguments, env, writer, writer)
        os.close(writer)
        return Process(arguments, connection, os.fdopen(reader))

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess:
        """Run a command to its end. Raises subprocess.TimeoutExpired, and kills it, if it takes longer."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            connection = self._request(arguments, env, output.fileno(), errors.fileno())
            with Process(arguments, connection) as process:
                code = process.wait(timeout_s)
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess(list(arguments), code, *texts)

    def close(self) -> None:
        self._process.communicate()

    def _request(
        self, arguments: Sequence[str], env: Mapping[str, str], output: int, errors: int
    ) -> socket.socket:
        """Send a command that writes to these files. Returns the socket over which pid and exit code come."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(START_TIMEOUT_S)
        connection.connect(self._path)
        request = json.dumps([arguments, dict(env)]).encode()
        socket.send_fds(connection, [len(request).to_bytes(4)], [output, errors])
        connection.sendall(request)
        return connection


def _import() -> None:
    """Import what commands import, in the environment in which they do so (see `app.cluster.session`)."""
    from app.cluster import flags, session

    with session._environ(flags.LOCAL_FLAGS | flags.environment()):
        import ray.serve  # noqa: F401

        import app.jobs.compress
        import app.jobs.pipeline
        import app.jobs.predict
        import app.jobs.serve
        import app.jobs.sweep  # noqa: F401


def _receive(connection: socket.socket) -> tuple[list[str], dict[str, str], list[int]]:
    """Arguments and environment of a command, and the files for its output and its errors."""
    head, files, _, _ = socket.recv_fds(connection, 4, 2)
    size = int.from_bytes(head)
    content = b""
    while len(content) < size:
        content += connection.recv(size - len(content))
    arguments, env = json.loads(content)
    return arguments, env, files


def _serve(listener: socket.socket) -> list[str]:
    """Fork for each command. Returns, in the forked process only, the arguments of its command.

    The server process itself exits when its standard input closes, that is, when the test run has ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that ended children leave no zombies
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        with connection:
            if os.fork():
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            arguments, env, files = _receive(connection)
            if pid := os.fork():
                for file in files:
                    os.close(file)  # a pipe ends when the command closes it
                connection.sendall(f"{pid}\n".encode())
                _, status = os.waitpid(pid, 0)
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os._exit(0)
        listener.close()
        for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(env)
        return arguments


def main(listener: int) -> None:
    _import()
    with socket.socket(fileno=listener) as listening:
        arguments = _serve(listening)
    sys.argv = ["raylway", *arguments]
    from app.cli import main

    main.main()


if __name__ == "__main__":
    main(int(sys.argv[1]))
