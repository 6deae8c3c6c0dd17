"""A sweep, from the stored study to its end: Ray Tune runs the trials, and whatever ends is stored."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune import schedulers

from app.config import Choice, Int, Project, Sweep
from app.config.sweep import SWEPT
from app.data.prepare import prepare
from app.errors import Interrupted, UserError
from app.home import home
from app.training import trainer
from app.tuning import study as studies
from app.tuning.search import Planned, Search, state_of
from app.tuning.space import Space
from app.tuning.study import Study
from app.tuning.trial import Trial, with_fold

QUIET = {
    # The study is what is kept: Tune's own logs and snapshots would cost a third of a second a trial.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
WHOLE_MODEL = ("model", "model.kind", "model.encoder")
"""Keys of a model on which the prepared data depend too."""
LONG = 10**6
"""More epochs than any training has: schedulers end what reaches their last one."""


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


def run(
    project: Project,
    watch: Watch,
    say: Callable[[str], None],
    on_trial: Callable[[FrozenTrial], None] = lambda _: None,
) -> Progress:
    """Run a project's sweep to its end, going on from what is stored. Needs Ray.

    `watch` hears of every change, `say` lines for a person, `on_trial` each trial that is stored as finished,
    those of earlier calls first. Raises UserError for a space that makes no sense, a study that another
    sweep has or that began with other settings, and a database that stays away; Interrupted on SIGTERM or
    Ctrl-C, and when the wall time is used up, with all that was done kept.
    """
    space = Space(project)
    space.check()
    sweep = space.sweep
    name = sweep.study or project.name
    with studies.opened(name, sweep.directions, _facts(space), say) as study:
        stored = study.trials()
        finished = [trial for trial in stored if trial.state in FINISHED]
        progress = Progress(
            name, sweep.trials, sweep.objectives, list(sweep.directions), finished, before=len(finished)
        )
        for trial in finished:
            on_trial(trial)
        watch(progress)
        recorder = Recorder(sweep, study, progress, watch, on_trial)
        if len(finished) < sweep.trials and not recorder.reached():
            planned = _planned(space, stored)
            if sweep.search == "grid":
                progress.wanted = min(sweep.trials, len(finished) + len(planned))
            learnt = [*_learnt(space, sweep.warm_start), *(t for t in finished if _tells(t))]
            search = Search(space, study, planned, learnt, recorder.goes_on)
            caught = _tune(space, search, recorder, finished, say)
        else:
            caught = []
        _clean(progress)
    if caught:
        raise Interrupted(f"{len(progress.trials)} of {progress.wanted} trials are stored", caught[0])
    return progress


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
        self._kept: set[str] = set()
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
        self._finish(trial, None, str(trial.get_error() or "its process died").strip().splitlines()[-1])

    def _finish(self, trial: Any, result: dict[str, Any] | None, error: str) -> None:
        number = self._numbers[trial.trial_id]
        state = state_of(result, bool(error))
        took = time.monotonic() - self._begun.get(trial.trial_id, time.monotonic())
        facts: dict[str, Any] = {"core_seconds": round(took * self._cores, 3)}
        values = None
        result = result or {}
        if state == TrialState.COMPLETE:
            values = [float(result[name]) for name in self._sweep.objectives]
            facts |= {"history": json.loads(result["history"]), "epochs": result["epochs"]}
            facts["core_seconds"] = round(result["core_seconds"], 3)
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
        stored = next(t for t in self._study.trials() if t.number == number)
        self._progress.trials.append(stored)
        if state == TrialState.COMPLETE:
            self._drop_beaten()
        self._on_trial(stored)
        self._watch(self._progress)

    def _drop_beaten(self) -> None:
        """Of the networks that this sweep trained, keep the best: the others can be trained again."""
        best = {key for trial in self._progress.best() for key in trial.user_attrs.get("made", [])}
        for trial in self._progress.trials:
            for key in set(trial.user_attrs.get("made", [])) - best - self._kept:
                shutil.rmtree(home() / "stages" / "train" / key, ignore_errors=True)
                self._kept.add(key)


class _Stopper(tune.Stopper):
    def __init__(self, event: threading.Event):
        self._event = event

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()


def _tune(
    space: Space,
    search: Search,
    recorder: Recorder,
    finished: Sequence[FrozenTrial],
    say: Callable[[str], None],
) -> list[int]:
    """Have Ray Tune run the trials that are left; returns the signals that came."""
    sweep = space.sweep
    workers = _most_workers(space)
    per_worker = trainer.resources(space.base)
    here = workers == 1
    cores = workers * per_worker["CPU"]
    recorder.of(search.numbers, cores)
    prepared = _prepare(space)
    settings = {
        "home": str(home()),
        "project": space.base.model_copy(update={"sweep": sweep}).model_dump_json(exclude_unset=True),
        "prepared": prepared,
        "here": here,
    }
    # Several workers are placed by Ray Train, beside the trial, which only waits for them.
    # Tune takes no trial that takes nothing: a byte of memory.
    claimed = {"memory": 1.0} if not here else per_worker if prepared else _less_one_cpu(per_worker)
    resources = tune.PlacementGroupFactory([claimed])
    scheduler = _scheduler(sweep)
    _remember(scheduler, finished, sweep)
    several = len(sweep.objectives) > 1
    folder = home() / "sweeps" / search._stored.name / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    failure: list[BaseException] = []
    at_once = sweep.concurrent or _room(cores, per_worker, workers)

    def fit() -> None:
        try:
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(Trial, settings=settings), resources),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    metric=None if several else sweep.objectives[0],
                    mode=None if several else sweep.directions[0][:3],
                    num_samples=recorder._progress.wanted - len(finished),
                    # A population is there as a whole; those that have no room take turns.
                    max_concurrent_trials=sweep.trials if sweep.pruned_by.kind == "pbt" else at_once,
                    # Starting a process takes seconds. With several workers the process is the trial's
                    # own: when it ends, they end.
                    reuse_actors=here,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder.parent),
                    stop=_Stopper(recorder.stop),
                    callbacks=[recorder],
                    failure_config=tune.FailureConfig(max_failures=sweep.retries),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            tuner.fit()
        except BaseException as error:
            failure.append(error)

    try:
        # In a thread of its own: in the main one, signals would have to wait for Tune.
        with trainer.passing_signals_on(recorder.stop.set) as caught:
            thread = threading.Thread(target=fit, name="tune", daemon=True)
            thread.start()
            said = False
            while thread.is_alive():
                thread.join(0.2)
                if caught and not said:
                    say("stopping; running trials write a checkpoint. The same again stops at once")
                    said = True
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
    if failure:
        raise _cause(failure[0])
    return caught


def _cause(error: BaseException) -> BaseException:
    """What Tune has wrapped."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, UserError):
            return at
        at = at.__cause__ or at.__context__
    return error


def _facts(space: Space) -> dict[str, Any]:
    """What the trials of a study must have in common to be compared."""
    asked = {"space", "constraints", "objectives", "folds"}
    document = space.base.model_dump(mode="json", include=set(SWEPT))
    for key in trainer.NOT_OF_THE_RESULT:
        del document["training"][key]
    for key in space.sweep.space:
        _remove(document, key.split("."))
    return {"sweep": space.sweep.model_dump(mode="json", include=asked), "project": document}


def _remove(document: Any, path: Sequence[str]) -> None:
    """What the space sets says nothing of what the trials share."""
    for part in path[:-1]:
        document = document.get(part) if isinstance(document, dict) else None
    if isinstance(document, dict):
        document.pop(path[-1], None)


def _planned(space: Space, stored: Sequence[FrozenTrial]) -> list[Planned]:
    """What comes first: trials that were interrupted, then points chosen by hand, then those of a grid."""
    planned = [Planned(t.params, t.number) for t in stored if t.state == TrialState.WAITING]
    tried = [t.params for t in stored]
    for values in space.sweep.points:
        point = space.encoded(values)
        if not any(point.items() <= params.items() for params in tried):
            planned.append(Planned(point))
    if space.sweep.search == "grid":
        planned += [Planned(p) for p in space.points() if p not in tried and space.admits(p)]
    return planned


def _learnt(space: Space, names: Sequence[str]) -> list[FrozenTrial]:
    """Trials of earlier studies that fit the space."""
    learnt = []
    for name in names:
        earlier = studies.load(name)
        if [d.name.lower() for d in earlier.directions] != list(space.sweep.directions):
            raise UserError(f"sweep.warm_start: the study {name!r} has other objectives")
        fitting = []
        for trial in earlier.trials:
            ours = space.distributions({k: v for k, v in trial.params.items() if k in space.sweep.space})
            fits = len(ours) == len(trial.params) and all(
                ours[key]._contains(ours[key].to_internal_repr(value)) for key, value in trial.params.items()
            )
            if fits and _tells(trial):
                # Optuna refuses the same parameter with other bounds.
                copied = FrozenTrial(**{**_fields(trial), "distributions": ours})
                fitting.append(copied)
        if not fitting:
            raise UserError(f"sweep.warm_start: no trial of the study {name!r} lies within this space")
        learnt += fitting
    return learnt


def _fields(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "value": None,
        "values": trial.values,
        "datetime_start": trial.datetime_start,
        "datetime_complete": trial.datetime_complete,
        "params": trial.params,
        "user_attrs": {},
        "system_attrs": {},
        "intermediate_values": trial.intermediate_values,
        "trial_id": trial._trial_id,
    }


def _tells(trial: FrozenTrial) -> bool:
    """Whether a search can learn from a trial."""
    return trial.state == TrialState.COMPLETE or (
        trial.state == TrialState.PRUNED and bool(trial.intermediate_values)
    )


def _scheduler(sweep: Sweep) -> schedulers.TrialScheduler:
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
class _Earlier:
    """A stored trial, as a scheduler knows trials."""

    trial_id: str


def _remember(scheduler: Any, finished: Sequence[FrozenTrial], sweep: Sweep) -> None:
    """Successive halving goes on with the rungs of the trials before."""
    if not isinstance(scheduler, schedulers.AsyncHyperBandScheduler):
        return
    sign = 1.0 if sweep.directions[0] == "maximize" else -1.0
    for trial in finished:
        steps = sorted(trial.intermediate_values.items())
        for bracket in scheduler._brackets:
            for epochs, value in steps:
                bracket.on_result(_Earlier(f"stored-{trial.number}"), epochs, sign * value)


def _prepare(space: Space) -> list[str]:
    """Prepare the data that all trials share, of each fold; empty if the space has them differ."""
    if any(
        key in WHOLE_MODEL or key.split(".")[0] in ("data", "features", "seed") for key in space.sweep.space
    ):
        return []
    base, folds = space.base, space.sweep.folds
    parts = [with_fold(base, i, folds) for i in range(folds)] if folds else [base]
    return [str(prepare(part).path) for part in parts]


def _less_one_cpu(per_worker: Mapping[str, float]) -> dict[str, float]:
    """What a trial claims that prepares data: so much less than it takes that each node has a CPU left.

    Ray Data's tasks would wait for one forever, as the trial waits for them.
    """
    smallest = min(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])
    return {**per_worker, "CPU": per_worker["CPU"] * max(0.0, 1 - 1 / smallest)}


def _most_workers(space: Space) -> int:
    """Of any trial."""
    parameter = space.sweep.space.get("training.num_workers")
    if isinstance(parameter, Choice):
        return max(max(v) if isinstance(v, list) else v for v in parameter.values)
    if isinstance(parameter, Int):
        return parameter.high
    return space.base.training.max_workers


def _room(cores: float, per_worker: Mapping[str, float], workers: int) -> int:
    """How many trials the cluster has room for at once."""
    there = ray.cluster_resources()
    rooms = [int(there.get("CPU", 0.0) / cores + 1e-9)]
    if "GPU" in per_worker:
        rooms.append(int(there.get("GPU", 0.0) / (workers * per_worker["GPU"]) + 1e-9))
    if min(rooms) < 1:
        raise UserError(
            f"a trial takes {cores:g} CPUs ({workers} workers), but the cluster has {there.get('CPU', 0):g}; "
            "lower training.num_workers or training.num_cpus"
        )
    return min(rooms)


def _clean(progress: Progress) -> None:
    """Checkpoints of trials that are over."""
    for trial in progress.trials:
        if run := trial.user_attrs.get("run"):
            shutil.rmtree(home() / "runs" / run, ignore_errors=True)
