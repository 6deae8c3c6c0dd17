"""Commands of Raylway for tests, in processes that do not import anything any more.

Importing Ray, PyTorch and MLflow takes a command four seconds. Here one process imports them, in the
environment that a command gives itself, and forks for each command. That a command also starts without it is
shown by the tests that start `python -m app` themselves.
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

ROOT = Path(__file__).parents[1]
START_S = 120.0


class CommandServer:
    """Runs commands from forks of a process of its own, which ends with `close`."""

    def __init__(self, env: Mapping[str, str], folder: Path):
        self._path = str(folder / "server.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        listener.listen()
        with listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.command_server", str(listener.fileno())],
                cwd=ROOT, env=dict(env), pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
            )  # fmt: skip

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess:
        """Run a command to its end. Raises subprocess.TimeoutExpired, and kills it, if it takes longer."""
        with (
            socket.socket(socket.AF_UNIX) as connection,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as errors,
        ):
            connection.settimeout(START_S)
            connection.connect(self._path)
            request = json.dumps([arguments, dict(env)]).encode()
            socket.send_fds(connection, [len(request).to_bytes(4)], [output.fileno(), errors.fileno()])
            connection.sendall(request)
            answers = connection.makefile()
            pid = int(answers.readline())
            connection.settimeout(timeout_s)
            try:
                code = int(answers.readline())
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(arguments), timeout_s) from None
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess(list(arguments), code, *texts)

    def close(self) -> None:
        self._process.communicate()


def _import() -> None:
    """Import what commands import, in the environment in which they do so (see `app.cluster.session`)."""
    from app.cluster import flags, session

    with session._environ(flags.LOCAL_FLAGS | flags.environment()):
        import ray.serve  # noqa: F401

        import app.jobs.compress
        import app.jobs.pipeline
        import app.jobs.predict
        import app.jobs.serve
        import app.tuning.tuner  # noqa: F401


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
    """Fork for each command, and return its arguments in the process that is to run it. In this process, exit
    when standard input ends, which is when the test run has ended."""
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
