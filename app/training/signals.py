"""Signals during a training or a sweep: the first stops it after a checkpoint, the second at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopping_on_signal(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call `stop` on the first SIGINT or SIGTERM during the block.

    A second signal runs the previous handler and raises KeyboardInterrupt. Yields a list to which the numbers
    of the signals are added. Outside of the main thread, handles no signals.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:
            stop()
            return
        if callable(previous := previous_handlers[signal.Signals(number)]):
            previous(number, frame)
        raise KeyboardInterrupt

    previous_handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)
