"""Growing waits between tries of what fails."""

import time
from collections.abc import Callable

FIRST_S, LAST_S = 2.0, 300.0


class Backoff:
    """When to try again: at once, after FIRST_S, then after twice as long each time, LAST_S at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._delay_s = 0.0
        self._until: float | None = None

    def due(self) -> bool:
        """Whether to try now."""
        return self._until is None or self._clock() >= self._until

    def failed(self) -> None:
        self._delay_s = min(LAST_S, 2 * self._delay_s or FIRST_S)
        self._until = self._clock() + self._delay_s

    def succeeded(self) -> None:
        self._delay_s, self._until = 0.0, None
