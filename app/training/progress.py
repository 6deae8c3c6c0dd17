"""The epochs of a training as they end, from rank 0 to whoever started it. Imports little: it is an actor."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

POLL_S = 0.2


@ray.remote(num_cpus=0)
class _Progress:
    """Hears of epochs from rank 0, on whatever node that is."""

    def __init__(self) -> None:
        self._epochs: list[dict[str, float]] = []
        self._diverged: int | None = None

    def diverge(self, epoch: int) -> None:
        self._diverged = epoch

    def diverged(self) -> int | None:
        """The epoch in which the loss was no longer finite."""
        return self._diverged

    def add(self, metrics: dict[str, float]) -> None:
        self._epochs.append(metrics)

    def since(self, count: int) -> list[dict[str, float]]:
        return self._epochs[count:]


@contextmanager
def listening(on_epoch: Callable[[dict[str, float]], None]) -> Iterator[Any]:
    """An actor for rank 0 to tell, and a thread here that passes on what it hears."""
    actor = _Progress.remote()  # type: ignore[attr-defined]
    done = threading.Event()

    def listen() -> None:
        count = 0
        last = False
        while not last:
            last = done.wait(POLL_S)
            for metrics in ray.get(actor.since.remote(count)):
                count += 1
                on_epoch(metrics)

    thread = threading.Thread(target=listen, name="progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        done.set()
        thread.join()
        ray.kill(actor)
