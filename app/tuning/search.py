"""The search algorithm for Ray Tune: Optuna's samplers, which learn from stored trials and new results."""

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
from app.tuning.plan import PlannedPoint
from app.tuning.space import Point, Space
from app.tuning.study import Study

MAX_REJECTED_POINTS = 10_000
"""Number of consecutive points that break a constraint, after which the search ends with an error."""


class Search(OptunaSearch):
    """Chooses points with an in-memory study, and stores each as a trial before it runs.

    The in-memory study also has the points that break a constraint; the stored study does not.
    """

    def __init__(
        self,
        space: Space,
        study: Study,
        planned_points: Sequence[PlannedPoint],
        informative_trials: Sequence[FrozenTrial],
        may_start: Callable[[], bool],
    ):
        """`planned_points` are tried first. `informative_trials` are finished trials, of this study and
        others, to learn from. No trial starts once `may_start` returns False.
        """
        sweep = space.sweep
        has_several = len(sweep.objectives) > 1
        modes = [direction[:3] for direction in sweep.directions]
        seed = (space.base.seed if sweep.seed is None else sweep.seed) + len(informative_trials)
        super().__init__(
            space=space.suggest,
            metric=sweep.objectives if has_several else sweep.objectives[0],
            mode=modes if has_several else modes[0],
            sampler=_sampler(sweep, seed),
        )
        self.numbers: dict[str, int] = {}
        """Number of each stored trial, by Tune's id."""
        self._search_space = space
        self._stored = study
        self._planned_points = list(planned_points)
        self._may_start = may_start
        self._reported: set[tuple[str, int]] = set()
        """Pairs of a trial's id and an epoch whose result the in-memory study has."""
        self._is_grid = sweep.search == "grid"
        self._ot_study.add_trials(informative_trials)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the search to restore a sweep from its own files; we restore from the study

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: Tune saves a search only to restore a sweep from its own files."""

    def suggest(self, trial_id: str) -> Any:
        if not self._may_start() or (self._is_grid and not self._planned_points):
            return Searcher.FINISHED
        planned = self._planned_points.pop(0) if self._planned_points else None
        for _ in range(MAX_REJECTED_POINTS):
            if planned is not None:
                self._ot_study.enqueue_trial(dict(planned.point))
            point = super().suggest(trial_id)
            if self._admits(point):
                break
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        else:
            raise UserError(
                f"sweep.constraints: {MAX_REJECTED_POINTS:,} points in a row broke them or made no valid "
                "project; narrow the space instead"
            )
        if planned is not None and planned.number is not None:
            self._stored.resume(planned.number)
            self.numbers[trial_id] = planned.number
        else:
            distributions = self._search_space.distributions(point)
            self.numbers[trial_id] = self._stored.begin(point, distributions, trial_id)
        return point

    def _admits(self, point: Point) -> bool:
        """Whether a point makes a valid project that meets the constraints. `Space.check` tests only some."""
        try:
            return self._search_space.admits(point)
        except ValidationError:
            return False

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if isinstance(self.metric, list):  # Optuna takes no intermediate values of several objectives
            return
        step = trial_id, result["epochs"]
        if step not in self._reported:  # a member of a population may reach an epoch twice
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
    """How a trial ended, from its last result."""
    if error or (result and "failed" in result):
        return TrialState.FAIL
    return TrialState.COMPLETE if result and result.get("finished") else TrialState.PRUNED


def _sampler(sweep: Sweep, seed: int) -> optuna.samplers.BaseSampler:
    startup = sweep.startup_trials
    if sweep.effective_scheduler.kind == "pbt":
        # A trial changes its settings, so its value does not rate the point that the search chose.
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
        match sweep.search:
            case "tpe":
                # `group` chooses parameters of the same branch of a conditional space together.
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
