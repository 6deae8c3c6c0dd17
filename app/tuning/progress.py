"""The progress of a sweep: finished and running trials, and the best of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState


@dataclass
class Running:
    """A trial that is running."""

    point: dict[str, Any]
    epochs: int = 0
    """Number of completed epochs, over all folds."""
    value: float | None = None
    """Value of the first objective after the last epoch."""


@dataclass
class Progress:
    """The progress of a sweep; `Watch` is called with it after each change."""

    study: str
    num_trials: int
    """Number of trials to finish, including those of earlier calls."""
    objectives: list[str]
    directions: list[str]
    """`maximize` or `minimize`, for each objective."""
    trials: list[FrozenTrial]
    """Finished trials, as stored."""
    running: dict[int, Running] = field(default_factory=dict)
    """Running trials by number."""
    started: float = field(default_factory=time.monotonic)
    """Start of this call, in seconds of the monotonic clock."""
    num_earlier: int = 0
    """Number of trials that earlier calls finished."""
    end_reason: str = ""
    """The budget or the target that ended the sweep before all trials, as text; empty if none did."""

    def count(self, state: TrialState) -> int:
        """Number of finished trials in a state."""
        return sum(trial.state == state for trial in self.trials)

    def best(self) -> list[FrozenTrial]:
        """The best trial, or with several objectives the Pareto front."""
        return best_of(self.trials, self.directions)

    def remaining_s(self) -> float | None:
        """Estimated time for the remaining trials, by the mean over the trials of this call; None before the
        first of them."""
        num_done = len(self.trials) - self.num_earlier
        if not num_done:
            return None
        return (time.monotonic() - self.started) / num_done * (self.num_trials - len(self.trials))


Watch = Callable[[Progress], None]
"""Callback for each change of a sweep's progress."""


class _Scored(NamedTuple):
    """A complete trial with its values, negated where the direction is `minimize`."""

    values: tuple[float, ...]
    trial: FrozenTrial


def ranked(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """The complete trials: first those of `best_of`, then the others, by the first objective each."""
    best = {trial.number for trial in best_of(trials, directions)}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sign = -1.0 if directions[0] == "maximize" else 1.0
    return sorted(
        complete, key=lambda trial: (trial.number not in best, sign * trial.values[0], trial.number)
    )


def best_of(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """The best complete trial, the earliest of equal ones; with several objectives, the Pareto front."""
    signs = [1.0 if direction == "maximize" else -1.0 for direction in directions]
    scored = [
        _Scored(tuple(sign * value for sign, value in zip(signs, trial.values, strict=True)), trial)
        for trial in trials
        if trial.state == TrialState.COMPLETE
    ]
    if len(signs) == 1:
        return [max(scored, key=lambda s: (s.values, -s.trial.number)).trial] if scored else []

    def is_dominated(values: tuple[float, ...]) -> bool:
        return any(
            all(o >= v for o, v in zip(other.values, values, strict=True)) and other.values != values
            for other in scored
        )

    return [trial for values, trial in scored if not is_dominated(values)]
