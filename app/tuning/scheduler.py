"""Ray Tune's schedulers: which trials are given up, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from optuna.trial import FrozenTrial
from ray import tune
from ray.tune import schedulers

from app.config import Choice, Int, Sweep

LONG = 10**6
"""More epochs than any training has: schedulers end what reaches their last one."""


def scheduler_of(sweep: Sweep) -> schedulers.TrialScheduler:
    """Ray Tune's scheduler that a sweep asks for."""
    rule = sweep.pruned_by
    match rule.kind:
        case "asha" | "hyperband":
            return schedulers.AsyncHyperBandScheduler(
                time_attr="epochs",
                max_t=LONG,
                grace_period=rule.grace_epochs,
                reduction_factor=rule.reduction_factor,
                brackets=rule.brackets if rule.kind == "hyperband" else 1,
            )
        case "median":
            return schedulers.MedianStoppingRule(
                time_attr="epochs",
                grace_period=rule.grace_epochs,
                min_samples_required=rule.min_trials,
                min_time_slice=LONG,  # no trial makes room for others on its way
            )
        case "pbt":
            return Population(
                time_attr="epochs",
                perturbation_interval=rule.every_epochs,
                hyperparam_mutations={key: _mutation(p) for key, p in sweep.space.items()},
            )
    return schedulers.FIFOScheduler()


class Population(schedulers.PopulationBasedTraining):
    """Ray's, which refuses every search algorithm: ours only deals out the settings to begin with."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)


def _mutation(parameter: Any) -> Any:
    """What population based training changes a parameter to, now and then; otherwise a little up or down."""
    if isinstance(parameter, Choice):
        return parameter.values
    if isinstance(parameter, Int):
        return tune.randint(parameter.low, parameter.high + 1)
    if parameter.log:
        return tune.loguniform(parameter.low, parameter.high)
    return tune.uniform(parameter.low, parameter.high)


@dataclass(frozen=True)
class Earlier:
    """A stored trial, as a scheduler knows trials."""

    trial_id: str


def remember(scheduler: Any, finished: Sequence[FrozenTrial], sweep: Sweep) -> None:
    """Have successive halving go on with the rungs of the trials before."""
    if not isinstance(scheduler, schedulers.AsyncHyperBandScheduler):
        return
    sign = 1.0 if sweep.directions[0] == "maximize" else -1.0
    for trial in finished:
        steps = sorted(trial.intermediate_values.items())
        for bracket in scheduler._brackets:
            for epochs, value in steps:
                bracket.on_result(Earlier(f"stored-{trial.number}"), epochs, sign * value)
