"""A thread that repeats a step, and retries it if it fails."""

import threading
from collections.abc import Callable

from app.serving.logs import log
from app.state import engine

RETRY_S = 1.0
"""Pause after the first failure. It doubles after each further failure."""
MAX_RETRY_S = 30.0
"""Maximum pause between two attempts."""


class RetryingThread(threading.Thread):
    """Runs a step again and again until `closing` is set, and then once more.

    A step that raises is retried after a pause. `fault` has the reason until the step succeeds.
    """

    def __init__(self, step: Callable[[], None], name: str, closing: threading.Event):
        super().__init__(name=name, daemon=True)
        self.fault: str | None = None
        """Reason why the last step failed; None if it succeeded."""
        self._step = step
        self._closing = closing

    def run(self) -> None:
        pause_s = RETRY_S
        while True:
            is_last = self._closing.is_set()
            try:
                self._step()
                self.fault, pause_s = None, RETRY_S
            except Exception as error:
                if self.fault is None:
                    log.exception("records cannot be written; they are kept in memory, and written later")
                self.fault = engine.reason(error)
                if not is_last:
                    self._closing.wait(pause_s)
                    pause_s = min(2 * pause_s, MAX_RETRY_S)
            if is_last:
                return
