"""Ray Tune's search algorithm: Optuna's samplers, learning from what is stored and from what comes."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from app.config import Sweep
from app.errors import UserError
from app.tuning.plan import Planned
from app.tuning.space import Point, Space
from app.tuning.study import Study

MOST_REJECTED = 10_000
"""Points in a row that break a constraint, before the search gives up."""


class Search(OptunaSearch):
    """Chooses points by a study in memory, and has each stored before it is tried.

    Points that break a constraint are drawn and dropped in memory alone, so the stored study has none.
    """

    def __init__(
        self,
        space: Space,
        study: Study,
        planned: Sequence[Planned],
        learnt: Sequence[FrozenTrial],
        goes_on: Callable[[], bool],
    ):
        """`learnt` are finished trials of this study and others; no more is begun once `goes_on` is false."""
        sweep = space.sweep
        several = len(sweep.objectives) > 1
        modes = [way[:3] for way in sweep.directions]
        seed = (space.base.seed if sweep.seed is None else sweep.seed) + len(learnt)
        super().__init__(
            space=space.suggest,
            metric=sweep.objectives if several else sweep.objectives[0],
            mode=modes if several else modes[0],
            sampler=_sampler(sweep, seed),
        )
        self.numbers: dict[str, int] = {}
        """The stored number of each of Tune's trials."""
        self._search_space = space
        self._stored = study
        self._planned = list(planned)
        self._goes_on = goes_on
        self._reported: set[tuple[str, int]] = set()
        self._only_planned = sweep.search == "grid"
        self._ot_study.add_trials(learnt)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it is given, to restore it one day; we go by the stored study

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see above."""

    def suggest(self, trial_id: str) -> Any:
        if not self._goes_on() or (self._only_planned and not self._planned):
            return Searcher.FINISHED
        planned = self._planned.pop(0) if self._planned else None
        for _ in range(MOST_REJECTED):
            if planned is not None:
                self._ot_study.enqueue_trial(dict(planned.point))
            point = super().suggest(trial_id)
            if self._admits(point):
                break
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        else:
            raise UserError(
                f"sweep.constraints: {MOST_REJECTED:,} points in a row broke them or made no valid project; "
                "narrow the space instead"
            )
        if planned is not None and planned.number is not None:
            self._stored.resume(planned.number)
            self.numbers[trial_id] = planned.number
        else:
            distributions = self._search_space.distributions(point)
            self.numbers[trial_id] = self._stored.begin(point, distributions, trial_id)
        return point

    def _admits(self, point: Point) -> bool:
        """Whether a point meets the constraints and makes a valid project: `check` saw some of them alone."""
        try:
            return self._search_space.admits(point)
        except ValidationError:
            return False

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if isinstance(self.metric, list):  # of several objectives Optuna takes no steps
            return
        step = trial_id, result["epochs"]
        if step not in self._reported:  # a member of a population may come to an epoch again
            self._reported.add(step)
            self._ot_trials[trial_id].report(result[self.metric], result["epochs"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._ot_trials[trial_id]
        state = state_of(result, error)
        values = None
        if state == TrialState.COMPLETE:
            assert result
            names = self.metric if isinstance(self.metric, list) else [self.metric]
            values = [result[name] for name in names]
        elif state == TrialState.PRUNED and result:
            self.on_trial_result(trial_id, result)
        self._ot_study.tell(trial, values, state)


def state_of(result: dict[str, Any] | None, error: bool) -> TrialState:
    """How a trial ended, by its last result."""
    if error or (result and "failed" in result):
        return TrialState.FAIL
    return TrialState.COMPLETE if result and result.get("finished") else TrialState.PRUNED


def _sampler(sweep: Sweep, seed: int) -> optuna.samplers.BaseSampler:
    startup = sweep.startup_trials
    if sweep.pruned_by.kind == "pbt":  # a value says little of the settings at which the trial began
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
        match sweep.search:
            case "tpe":
                # In groups, so that parameters that stand side by side are chosen together in each branch.
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
                )
            case "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, startup))
        return optuna.samplers.RandomSampler(seed=seed)
