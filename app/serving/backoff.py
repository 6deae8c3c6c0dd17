"""Exponential backoff between retries."""

import time
from collections.abc import Callable

FIRST_DELAY_S = 2.0
"""Delay after the first failure."""
MAX_DELAY_S = 300.0
"""Upper bound of the delay."""


class Backoff:
    """Time of the next try: now, then FIRST_DELAY_S after a failure, doubled after each further failure up to
    MAX_DELAY_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock` returns seconds."""
        self._clock = clock
        self._delay_s = 0.0
        self._next_try_at: float | None = None

    def due(self) -> bool:
        """Whether the next try may start."""
        return self._next_try_at is None or self._clock() >= self._next_try_at

    def failed(self) -> None:
        """Record a failure: the next try is due after the next delay."""
        self._delay_s = min(MAX_DELAY_S, 2 * self._delay_s or FIRST_DELAY_S)
        self._next_try_at = self._clock() + self._delay_s

    def succeeded(self) -> None:
        """Record a success: the next try is due at once."""
        self._delay_s, self._next_try_at = 0.0, None
