"""Stores the results that Ray Tune reports in the study, and decides when the sweep ends."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune

from app.config import Sweep
from app.errors import describe_traceback
from app.state import stages
from app.tuning.progress import Progress, Running, Watch
from app.tuning.search import state_of
from app.tuning.study import Study


class Recorder(tune.Callback):
    """Receives Ray Tune's events, and updates the study and the progress."""

    def __init__(
        self,
        sweep: Sweep,
        study: Study,
        progress: Progress,
        watch: Watch,
        on_trial: Callable[[FrozenTrial], None],
    ):
        """`on_trial` is called with each trial that is stored as finished."""
        self.stop = threading.Event()
        """Event that ends all trials."""
        self._sweep = sweep
        self._study = study
        self._progress = progress
        self._watch = watch
        self._on_trial = on_trial
        self._core_seconds = sum(t.user_attrs.get("core_seconds", 0.0) for t in progress.trials)
        self._numbers: Mapping[str, int] = {}
        self._dropped: set[str] = set()
        """Keys of the trainings whose networks were removed."""
        self._started: dict[str, float] = {}
        """Start of each trial in seconds of the monotonic clock, by Tune's id."""
        self._cores_per_trial = 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks to restore a sweep from its own files; we restore from the study

    def attach(self, numbers: Mapping[str, int], cores_per_trial: float) -> None:
        """Set the number of each stored trial, by Tune's id, and the CPUs of a trial."""
        self._numbers, self._cores_per_trial = numbers, cores_per_trial

    def may_start(self) -> bool:
        """Whether another trial may start."""
        return not self.stop.is_set() and not self.is_over()

    def is_over(self) -> bool:
        """Whether a budget is used up or the target is reached; if so, sets the progress's `end_reason`."""
        sweep, progress = self._sweep, self._progress
        hours = (time.monotonic() - progress.started) / 3600
        if sweep.max_hours is not None and hours >= sweep.max_hours:
            progress.end_reason = f"sweep.max_hours of {sweep.max_hours:g} are used up"
        elif sweep.max_core_hours is not None and self._core_seconds / 3600 >= sweep.max_core_hours:
            progress.end_reason = f"sweep.max_core_hours of {sweep.max_core_hours:g} are used up"
        elif sweep.target is not None and (best := progress.best()):
            sign = 1 if sweep.directions[0] == "maximize" else -1
            if sign * best[0].values[0] >= sign * sweep.target:
                progress.end_reason = f"trial {best[0].number} has reached sweep.target {sweep.target:g}"
        return bool(progress.end_reason)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self.stop.is_set() and self.is_over():
            self.stop.set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._numbers[trial.trial_id]
        self._started.setdefault(trial.trial_id, time.monotonic())
        self._progress.running.setdefault(number, Running(trial.config))
        self._watch(self._progress)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = self._numbers[trial.trial_id]
        if "failed" in result:
            return
        value = result.get(self._sweep.objectives[0])
        if value is not None:
            self._study.report(number, result["epochs"], value)
        if running := self._progress.running.get(number):
            running.epochs, running.value = result["epochs"], value
        self._watch(self._progress)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finish(trial, trial.last_result, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        self._finish(trial, None, describe_traceback(str(error)) if error else "its process died")

    def _finish(self, trial: Any, result: dict[str, Any] | None, error: str) -> None:
        """Store the end of a trial. `result` is its last result; `error` is empty unless the trial failed."""
        number = self._numbers[trial.trial_id]
        state = state_of(result, bool(error))
        seconds = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        attributes: dict[str, Any] = {"core_seconds": seconds * self._cores_per_trial}
        values = None
        result = result or {}
        if state == TrialState.COMPLETE:
            values = [float(result[name]) for name in self._sweep.objectives]
            attributes |= {"history": json.loads(result["history"]), "epochs": result["epochs"]}
            attributes["core_seconds"] = result["core_seconds"]
            attributes["made"] = result["made"]
            if self._sweep.effective_scheduler.kind == "pbt":
                attributes["point"] = dict(trial.config)
        elif state == TrialState.FAIL:
            attributes["error"] = result.get("failed", error)
        else:
            attributes |= {"epochs": result.get("epochs", 0), "run": result.get("run", "")}
        self._study.finish(number, state, values, attributes)
        self._core_seconds += attributes["core_seconds"]
        self._progress.running.pop(number, None)
        stored = self._study.trial(number)
        self._progress.trials.append(stored)
        if state == TrialState.COMPLETE:
            self._drop_networks()
        self._on_trial(stored)
        self._watch(self._progress)

    def _drop_networks(self) -> None:
        """Remove the networks that this sweep trained, except the best; they can be trained again."""
        best = {key for trial in self._progress.best() for key in trial.user_attrs.get("made", [])}
        for trial in self._progress.trials:
            for key in set(trial.user_attrs.get("made", [])) - best - self._dropped:
                stages.drop(stages.folder("train", key))
                self._dropped.add(key)


class Stopper(tune.Stopper):
    """Ends all of Tune's trials once an event is set."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()
