"""What a search begins with: points to try before it chooses, and trials to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState, create_trial

from app.errors import UserError
from app.tuning import study as studies
from app.tuning.space import Point, Space


@dataclass(frozen=True)
class Planned:
    """A point to try before the search chooses."""

    point: Point
    number: int | None = None
    """Of the stored trial that was interrupted, to be gone on with."""


def planned(space: Space, stored: Sequence[FrozenTrial]) -> list[Planned]:
    """What comes first: trials that were interrupted, then points chosen by hand, then those of a grid."""
    found = [Planned(t.params, t.number) for t in stored if t.state == TrialState.WAITING]
    tried = [t.params for t in stored]
    for values in space.sweep.points:
        point = space.encoded(values)
        if not any(point.items() <= params.items() for params in tried):
            found.append(Planned(point))
    if space.sweep.search == "grid":
        found += [Planned(p) for p in space.points() if p not in tried and space.admits(p)]
    return found


def learnt(space: Space, finished: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The finished trials that tell something, and those of the earlier studies that `warm_start` names.

    Raises UserError for a study that is not there, has other objectives, or no trial within this space.
    """
    found = []
    for name in space.sweep.warm_start:
        earlier = studies.load(name)
        if [d.name.lower() for d in earlier.directions] != list(space.sweep.directions):
            raise UserError(f"sweep.warm_start: the study {name!r} has other objectives")
        within = [_copied(t, space) for t in earlier.trials if _tells(t) and space.contains(t.params)]
        if not within:
            raise UserError(f"sweep.warm_start: no trial of the study {name!r} lies within this space")
        found += within
    return [*found, *(trial for trial in finished if _tells(trial))]


def _copied(trial: FrozenTrial, space: Space) -> FrozenTrial:
    """With this space's ranges: Optuna refuses the same parameter with others."""
    return create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=space.distributions(trial.params),
        intermediate_values=trial.intermediate_values,
    )


def _tells(trial: FrozenTrial) -> bool:
    """Whether a search can learn from a trial."""
    return trial.state == TrialState.COMPLETE or (
        trial.state == TrialState.PRUNED and bool(trial.intermediate_values)
    )
