"""What Ray Tune tells of its trials goes into the stored study; and when the sweep is to end."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune

from app.config import Sweep
from app.errors import described_in
from app.state import stages
from app.tuning.progress import Progress, Watch
from app.tuning.search import state_of
from app.tuning.study import Study


class Recorder(tune.Callback):
    """Stores what comes of each trial, and says when the sweep ends."""

    def __init__(
        self,
        sweep: Sweep,
        study: Study,
        progress: Progress,
        watch: Watch,
        on_trial: Callable[[FrozenTrial], None],
    ):
        self.stop = threading.Event()
        self._sweep = sweep
        self._study = study
        self._progress = progress
        self._watch = watch
        self._on_trial = on_trial
        self._core_seconds = sum(t.user_attrs.get("core_seconds", 0.0) for t in progress.trials)
        self._numbers: Mapping[str, int] = {}
        self._dropped: set[str] = set()
        self._begun: dict[str, float] = {}
        self._cores = 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as the search's

    def of(self, numbers: Mapping[str, int], cores: float) -> None:
        """`numbers` are of the stored trials by Tune's ids, `cores` what each trial has."""
        self._numbers, self._cores = numbers, cores

    def goes_on(self) -> bool:
        """Whether more trials may begin."""
        return not self.stop.is_set() and not self.reached()

    def reached(self) -> bool:
        """Whether the target or a budget ends the sweep; says so in the progress."""
        sweep, progress = self._sweep, self._progress
        hours = (time.monotonic() - progress.started) / 3600
        if sweep.max_hours is not None and hours >= sweep.max_hours:
            progress.reason = f"sweep.max_hours of {sweep.max_hours:g} are used up"
        elif sweep.max_core_hours is not None and self._core_seconds / 3600 >= sweep.max_core_hours:
            progress.reason = f"sweep.max_core_hours of {sweep.max_core_hours:g} are used up"
        elif sweep.target is not None and (best := progress.best()):
            sign = 1 if sweep.directions[0] == "maximize" else -1
            if sign * best[0].values[0] >= sign * sweep.target:
                progress.reason = f"trial {best[0].number} has reached sweep.target {sweep.target:g}"
        return bool(progress.reason)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self.stop.is_set() and self.reached():
            self.stop.set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._numbers[trial.trial_id]
        self._begun.setdefault(trial.trial_id, time.monotonic())
        self._progress.running.setdefault(number, {"point": trial.config, "epochs": 0, "value": None})
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
        if number in self._progress.running:
            self._progress.running[number] |= {"epochs": result["epochs"], "value": value}
        self._watch(self._progress)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finish(trial, trial.last_result, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        self._finish(trial, None, described_in(str(error)) if error else "its process died")

    def _finish(self, trial: Any, result: dict[str, Any] | None, error: str) -> None:
        number = self._numbers[trial.trial_id]
        state = state_of(result, bool(error))
        took = time.monotonic() - self._begun.get(trial.trial_id, time.monotonic())
        facts: dict[str, Any] = {"core_seconds": took * self._cores}
        values = None
        result = result or {}
        if state == TrialState.COMPLETE:
            values = [float(result[name]) for name in self._sweep.objectives]
            facts |= {"history": json.loads(result["history"]), "epochs": result["epochs"]}
            facts["core_seconds"] = result["core_seconds"]
            facts["made"] = result["made"]
            if self._sweep.pruned_by.kind == "pbt":
                facts["point"] = dict(trial.config)
        elif state == TrialState.FAIL:
            facts["error"] = result.get("failed", error)
        else:
            facts |= {"epochs": result.get("epochs", 0), "run": result.get("run", "")}
        self._study.finish(number, state, values, facts)
        self._core_seconds += facts["core_seconds"]
        self._progress.running.pop(number, None)
        stored = self._study.trial(number)
        self._progress.trials.append(stored)
        if state == TrialState.COMPLETE:
            self._drop_beaten()
        self._on_trial(stored)
        self._watch(self._progress)

    def _drop_beaten(self) -> None:
        """Of the networks that this sweep trained, keep the best: the others can be trained again."""
        best = {key for trial in self._progress.best() for key in trial.user_attrs.get("made", [])}
        for trial in self._progress.trials:
            for key in set(trial.user_attrs.get("made", [])) - best - self._dropped:
                stages.drop(stages.folder("train", key))
                self._dropped.add(key)


class Stopper(tune.Stopper):
    """Has Tune end all trials once an event is set."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()
