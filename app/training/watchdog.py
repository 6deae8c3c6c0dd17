"""The watchdog kills a rank that hangs, or that waits for another rank that hangs."""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import TracebackType


class Watchdog:
    """Kills this process when `beat` has not been called for `timeout_s`. The first call starts the watch.

    When one rank hangs (a deadlock, a broken network, a stopped process), the others wait for it in the next
    exchange, by default for hours. With a watchdog each of them kills itself; Ray Train notices at once and
    restarts the group from the last checkpoint. As a context manager, it stops at the end of its block.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._last_beat = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def beat(self) -> None:
        """Record that training makes progress."""
        self._last_beat = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        # Count the intervals of this thread, not the time of the clock: after a pause of the whole process
        # (SIGSTOP, a suspended machine) the clock has jumped, but this rank had no time to make a step.
        interval_s = min(1.0, self._timeout_s / 4)
        silence_s, last_beat = 0.0, self._last_beat
        while not self._stopped.wait(interval_s):
            if self._last_beat != last_beat:
                silence_s, last_beat = 0.0, self._last_beat
                continue
            silence_s += interval_s
            if silence_s >= self._timeout_s:
                try:
                    message = f"no step for {self._timeout_s:g} s; killing this process. Its threads:"
                    print(message, file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(sys.stderr)
                finally:  # also if stderr is closed
                    os.kill(os.getpid(), signal.SIGKILL)
