"""Finds a rank that hangs: itself, or waiting for another that does."""

import faulthandler
import os
import signal
import sys
import threading
import time


class Watchdog:
    """Ends this process if there is no `beat` for too long, counted from the first one.

    When one rank hangs (a deadlock, a dead network, a stopped process), the others wait for it in the next
    exchange, for hours by default. Each of them then ends itself, Ray Train sees it at once, and starts the
    group again from the last checkpoint.
    """

    def __init__(self, timeout_s: float):
        self._timeout = timeout_s
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """The training goes on."""
        self._last = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        # Counted in own looks, not by the clock: after a pause of the whole process (SIGSTOP, a suspended
        # machine) the clock has jumped, though this rank was never given the time to make a step.
        interval = min(1.0, self._timeout / 4)
        silent, seen = 0.0, self._last
        while not self._done.wait(interval):
            if self._last != seen:
                silent, seen = 0.0, self._last
                continue
            silent += interval
            if silent >= self._timeout:
                try:
                    note = f"no step for {self._timeout:g} s; the threads stand here:"
                    print(note, file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(sys.stderr)
                finally:  # nobody may read what is written
                    os.kill(os.getpid(), signal.SIGKILL)
