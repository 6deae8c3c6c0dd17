"""Ray Tune's schedulers, which decide when trials are stopped early."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from optuna.trial import FrozenTrial
from ray import tune
from ray.tune import schedulers

from app.config import Choice, Int, Parameter, Sweep

NO_MAX_EPOCHS = 10**6
"""Maximum number of epochs for Tune's schedulers. They end a trial that reaches it, so no training may."""


def scheduler_of(sweep: Sweep) -> schedulers.TrialScheduler:
    """Ray Tune's scheduler for `sweep.scheduler`."""
    rule = sweep.effective_scheduler
    match rule.kind:
        case "asha" | "hyperband":
            return schedulers.AsyncHyperBandScheduler(
                time_attr="epochs",
                max_t=NO_MAX_EPOCHS,
                grace_period=rule.grace_epochs,
                reduction_factor=rule.reduction_factor,
                brackets=rule.brackets if rule.kind == "hyperband" else 1,
            )
        case "median":
            return schedulers.MedianStoppingRule(
                time_attr="epochs",
                grace_period=rule.grace_epochs,
                min_samples_required=rule.min_trials,
                min_time_slice=NO_MAX_EPOCHS,  # a trial is never paused for another
            )
        case "pbt":
            return Population(
                time_attr="epochs",
                perturbation_interval=rule.every_epochs,
                hyperparam_mutations={key: _mutation(p) for key, p in sweep.space.items()},
            )
    return schedulers.FIFOScheduler()


class Population(schedulers.PopulationBasedTraining):
    """Population based training that accepts a search algorithm, which chooses the initial settings only.

    Ray's own class refuses every search algorithm.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)


def _mutation(parameter: Parameter) -> Any:
    """The values from which population based training resamples a parameter."""
    if isinstance(parameter, Choice):
        return parameter.values
    if isinstance(parameter, Int):
        return tune.randint(parameter.low, parameter.high + 1)
    if parameter.log:
        return tune.loguniform(parameter.low, parameter.high)
    return tune.uniform(parameter.low, parameter.high)


@dataclass(frozen=True)
class StoredTrial:
    """A stored trial in the form in which a scheduler reads trials."""

    trial_id: str


def restore_rungs(scheduler: Any, finished: Sequence[FrozenTrial], sweep: Sweep) -> None:
    """Fill the rungs of successive halving with stored trials; other schedulers have none."""
    if not isinstance(scheduler, schedulers.AsyncHyperBandScheduler):
        return
    sign = 1.0 if sweep.directions[0] == "maximize" else -1.0
    for trial in finished:
        steps = sorted(trial.intermediate_values.items())
        for bracket in scheduler._brackets:
            for epochs, value in steps:
                bracket.on_result(StoredTrial(f"stored-{trial.number}"), epochs, sign * value)
