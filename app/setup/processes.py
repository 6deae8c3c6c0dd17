"""The processes that set-up starts, and stops when it ends."""

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
    """Processes that set-up has started. Each has its own process group, to which its children belong."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []
        self._is_stopped = False
        self._lock = threading.Lock()

    def start(self, command: Sequence[str | Path], **options) -> subprocess.Popen[str]:
        """Start a command whose output goes to a pipe. Raises UserError after `stop` was called."""
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
        """Terminate the running processes with their children, and refuse to start more."""
        with self._lock:
            self._is_stopped = True
        running = [process for process in self._started if process.poll() is None]
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, number)


PROCESSES = Processes()


def run_in_parallel(*tasks: Callable[[], object]) -> None:
    """Run tasks in threads. If one fails or a signal arrives, stop all processes and raise the error."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        try:
            for task in as_completed([threads.submit(task) for task in tasks]):
                task.result()
        except BaseException:
            PROCESSES.stop()  # otherwise the executor would wait for them
            raise


def run(command: Sequence[str | Path], **options) -> str:
    """Run a command and return its standard output. Raises UserError, with the output's end, if it fails."""
    process = PROCESSES.start(command, stderr=subprocess.PIPE, **options)
    output, errors = process.communicate()
    if process.returncode:
        name = " ".join(str(part) for part in command[1:5])
        raise UserError(f"`{name} ...` failed:\n{(errors or output).strip()[-2000:]}")
    return output
