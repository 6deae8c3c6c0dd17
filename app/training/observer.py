"""What a rank's training loop reports, and what can be requested of it while it runs."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # workers/progress.py runs in an actor, whose start should not wait for PyTorch
    from torch import nn


class Request(IntEnum):
    """What a training should do after the current step. Of the requests of all ranks the largest counts."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint and go on."""
    MOVE = 2
    """Write a checkpoint and end: this node is about to be taken away."""
    STOP = 3
    """Write a checkpoint and end: the user asked for it."""


class Outcome(StrEnum):
    """Why a training loop ended."""

    FINISHED = "finished"
    """All epochs are done, or early stopping ended the training."""
    STOPPED = "stopped"
    MOVED = "moved"
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
    """Receives the events of one rank's training loop and passes requests to it. This one does neither."""

    poll_interval_s = 1.0
    """How often the ranks agree on a request."""

    def begin(self, network: "nn.Module", epoch: int, step: int) -> None:
        """The loop is about to make its first step, in the epoch of this index after `step` steps of it."""

    def step(self, epoch: int, step: int) -> None:
        """A step is done; it was the `step`-th of its epoch."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done; the metrics are over all ranks."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def request(self) -> Request:
        """A new request, if there is one."""
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
        """`stop`, once set, requests the end."""
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
