"""The processes that set-up starts, and how all of them end together."""

from __future__ import annotations  # an older Python must get as far as the message that it is too old

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from app.errors import UserError

STOP_GRACE_S = 10.0
"""Processes that do not end within this time after SIGTERM are killed."""


class Processes:
    """The processes that set-up has started, each with a process group of its own for all that it starts."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []
        self._is_stopped = False
        self._lock = threading.Lock()

    def start(self, command: Sequence[str | Path], **options) -> subprocess.Popen[str]:
        """A process whose output is a pipe. Raises UserError once `stop` was called."""
        with self._lock:
            if self._is_stopped:
                raise UserError("set-up was stopped")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                process_group=0, **options,
            )  # fmt: skip
            self._started.append(process)
            return process

    def stop(self) -> None:
        """End all processes that are left, with what they have started, and start no more."""
        with self._lock:
            self._is_stopped = True
        left = [process for process in self._started if process.poll() is None]
        for process in left:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        for process in left:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended in the meantime
        os.killpg(process.pid, number)


PROCESSES = Processes()


def run_in_parallel(*tasks: Callable[[], object]) -> None:
    """Run tasks at once. If one fails, or a signal comes, end the processes of all and raise the error."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        try:
            for task in as_completed([threads.submit(task) for task in tasks]):
                task.result()
        except BaseException:
            PROCESSES.stop()  # before the threads are waited for
            raise


def run(command: Sequence[str | Path], **options) -> str:
    """The standard output of a command. Raises UserError with what it says if it fails."""
    process = PROCESSES.start(command, stderr=subprocess.PIPE, **options)
    output, errors = process.communicate()
    if process.returncode:
        what = " ".join(str(part) for part in command[1:5])
        raise UserError(f"`{what} ...` failed:\n{(errors or output).strip()[-2000:]}")
    return output
