"""A sweep as it stands: what is done, what runs, and what is best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState


@dataclass
class Progress:
    """A sweep as it stands, for whoever watches."""

    study: str
    wanted: int
    """Trials in all."""
    objectives: list[str]
    directions: list[str]
    trials: list[FrozenTrial]
    """Those that are stored as finished."""
    running: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By number: `point`, `epochs`, `value` so far."""
    started: float = field(default_factory=time.monotonic)
    before: int = 0
    """Finished trials of earlier calls."""
    reason: str = ""
    """Why it ended before all trials, if a budget or the target ended it."""

    def count(self, state: TrialState) -> int:
        return sum(trial.state == state for trial in self.trials)

    def best(self) -> list[FrozenTrial]:
        """The best trial, or with several objectives those that none other beats in all of them."""
        return best_of(self.trials, self.directions)

    def left_s(self) -> float | None:
        """Seconds that the rest will take, if like those of this call; None before the first."""
        done = len(self.trials) - self.before
        if not done:
            return None
        return (time.monotonic() - self.started) / done * (self.wanted - len(self.trials))


Watch = Callable[[Progress], None]
"""Hears of every change."""


def ranked(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """The complete trials, best first; with several objectives, those that are never beaten first."""
    best = {trial.number for trial in best_of(trials, directions)}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sign = -1.0 if directions[0] == "maximize" else 1.0
    return sorted(
        complete, key=lambda trial: (trial.number not in best, sign * trial.values[0], trial.number)
    )


def best_of(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """The complete trials that none other beats: the best of one objective, the Pareto front of several."""
    signs = [1.0 if direction == "maximize" else -1.0 for direction in directions]
    scored = [
        (tuple(sign * value for sign, value in zip(signs, trial.values, strict=True)), trial)
        for trial in trials
        if trial.state == TrialState.COMPLETE
    ]
    if len(signs) == 1:
        return [max(scored, key=lambda pair: (pair[0], -pair[1].number))[1]] if scored else []

    def beaten(values: tuple[float, ...]) -> bool:
        return any(all(o >= v for o, v in zip(other, values, strict=True)) and other != values
                   for other, _ in scored)  # fmt: skip

    return [trial for values, trial in scored if not beaten(values)]
