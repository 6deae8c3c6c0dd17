"""The events that a rank's training loop reports, and the requests that it obeys while it runs."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # workers/progress.py runs in an actor, whose start should not wait for PyTorch
    from torch import nn


class Request(IntEnum):
    """What a training should do after the current step. If the ranks differ, the largest request counts."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint and continue."""
    MOVE = 2
    """Write a checkpoint and end: this node is about to be taken away."""
    STOP = 3
    """Write a checkpoint and end: by a signal, or because a sweep stops the trial."""


class Outcome(StrEnum):
    """Why a training loop ended."""

    FINISHED = "finished"
    """All epochs are done, or early stopping ended the training."""
    STOPPED = "stopped"
    """By `Request.STOP`."""
    MOVED = "moved"
    """By `Request.MOVE`: the training must continue on other nodes."""
    DIVERGED = "diverged"
    """The loss is no longer finite."""


@dataclass(frozen=True)
class Ending:
    """How and where a training loop ended."""

    outcome: Outcome
    epoch: int
    """Index of the epoch of the last step."""
    step: int
    """Number of steps made in that epoch."""


class Observer:
    """Receives the events of one rank's training loop and passes requests to it.

    This base class ignores all events and requests nothing.
    """

    poll_interval_s = 1.0
    """Time between two polls, in which the ranks agree on a request."""

    def begin(self, network: "nn.Module", epoch: int, step: int) -> None:
        """The loop starts, in the epoch of this index after `step` steps of it."""

    def step(self, epoch: int, step: int) -> None:
        """A step is done; it was the `step`-th of its epoch."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done; its metrics are computed over all ranks."""

    def note(self, text: str) -> None:
        """The loop has a line for the user."""

    def request(self) -> Request:
        """The new request; NONE if there is none."""
        return Request.NONE

    def saved(self) -> None:
        """The checkpoint that was requested is on disk."""

    def end(self, ending: Ending) -> None:
        """The loop has ended, and its checkpoints are on disk."""


class InProcess(Observer):
    """Observer of the only rank, which trains in the thread that called for the training."""

    poll_interval_s = 0.0

    def __init__(
        self,
        on_epoch: Callable[[dict[str, float]], None],
        on_note: Callable[[str], None],
        stop: threading.Event,
    ):
        """`stop`, once set, requests a checkpoint and the end."""
        self.ending: Ending | None = None
        self._on_epoch = on_epoch
        self._on_note = on_note
        self._stop = stop

    def epoch(self, metrics: dict[str, float]) -> None:
        self._on_epoch(metrics)

    def note(self, text: str) -> None:
        self._on_note(text)

    def request(self) -> Request:
        return Request.STOP if self._stop.is_set() else Request.NONE

    def end(self, ending: Ending) -> None:
        self.ending = ending
