"""The start of a search: the points to try before it chooses any, and the finished trials to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState, create_trial

from app.errors import UserError
from app.tuning import study as studies
from app.tuning.space import Point, Space


@dataclass(frozen=True)
class PlannedPoint:
    """A point to try before the search chooses."""

    point: Point
    number: int | None = None
    """Number of the stored trial to resume; None for a new one."""


def planned_points(space: Space, stored: Sequence[FrozenTrial]) -> list[PlannedPoint]:
    """Interrupted trials, then the points of `sweep.points` and of a grid that have not been tried."""
    plan = [PlannedPoint(t.params, t.number) for t in stored if t.state == TrialState.WAITING]
    tried = [t.params for t in stored]
    for values in space.sweep.points:
        point = space.encode(values)
        if not any(point.items() <= params.items() for params in tried):
            plan.append(PlannedPoint(point))
    if space.sweep.search == "grid":
        plan += [PlannedPoint(p) for p in space.points() if p not in tried and space.admits(p)]
    return plan


def informative_trials(space: Space, finished: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that a search can learn from: those of the studies in `sweep.warm_start`, then `finished`.

    Raises UserError if a study does not exist, has other objectives, or has no trial within this space.
    """
    trials = []
    for name in space.sweep.warm_start:
        earlier = studies.load(name)
        if [d.name.lower() for d in earlier.directions] != list(space.sweep.directions):
            raise UserError(f"sweep.warm_start: the study {name!r} has other objectives")
        within = [
            _with_distributions_of(space, t)
            for t in earlier.trials
            if _has_values(t) and space.contains(t.params)
        ]
        if not within:
            raise UserError(f"sweep.warm_start: no trial of the study {name!r} lies within this space")
        trials += within
    return [*trials, *(trial for trial in finished if _has_values(trial))]


def _with_distributions_of(space: Space, trial: FrozenTrial) -> FrozenTrial:
    """A copy with the distributions of this space: Optuna refuses two distributions of one parameter."""
    return create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=space.distributions(trial.params),
        intermediate_values=trial.intermediate_values,
    )


def _has_values(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE or (
        trial.state == TrialState.PRUNED and bool(trial.intermediate_values)
    )
