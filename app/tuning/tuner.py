"""A sweep, from the stored study to its end: Ray Tune runs the trials, and whatever ends is stored."""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import TrialScheduler

from app.cluster import capacity
from app.config import Choice, Int, Project
from app.config.sweep import SWEPT
from app.data.prepare import prepare
from app.errors import Interrupted, UserError
from app.state import files
from app.state.home import home
from app.training import trainer
from app.training.signals import stopping_on_signal
from app.training.workers.fit import resources
from app.tuning import plan
from app.tuning import study as studies
from app.tuning.progress import Progress, Watch
from app.tuning.recorder import Recorder, Stopper
from app.tuning.scheduler import remember, scheduler_of
from app.tuning.search import Search
from app.tuning.space import Space
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
    Ctrl-C, with all that was done kept.
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
            planned = plan.planned(space, stored)
            if sweep.search == "grid":
                progress.wanted = min(sweep.trials, len(finished) + len(planned))
            search = Search(space, study, planned, plan.learnt(space, finished), recorder.goes_on)
            scheduler = scheduler_of(sweep)
            remember(scheduler, finished, sweep)
            caught = _tune(space, search, scheduler, recorder, progress, say)
        else:
            caught = []
        _clean(progress)
    if caught:
        raise Interrupted(f"{len(progress.trials)} of {progress.wanted} trials are stored", caught[0])
    return progress


def _tune(
    space: Space,
    search: Search,
    scheduler: TrialScheduler,
    recorder: Recorder,
    progress: Progress,
    say: Callable[[str], None],
) -> list[int]:
    """Have Ray Tune run the trials that are left; returns the signals that came."""
    sweep = space.sweep
    workers = _most_workers(space)
    per_worker, note = resources(space.base, workers)
    if note:
        say(note)
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
    placement = tune.PlacementGroupFactory([claimed])
    several = len(sweep.objectives) > 1
    folder = home() / "sweeps" / progress.study / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    # It looks for files that Tune was told not to write.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    failure: list[BaseException] = []
    at_once = sweep.concurrent or _room(cores, per_worker, workers)

    def run_tuner() -> None:
        try:
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(Trial, settings=settings), placement),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    metric=None if several else sweep.objectives[0],
                    mode=None if several else sweep.directions[0][:3],
                    num_samples=progress.wanted - progress.before,
                    # A population is there as a whole; those that have no room take turns.
                    max_concurrent_trials=sweep.trials if sweep.pruned_by.kind == "pbt" else at_once,
                    # Starting a process takes seconds. With several workers the process is the trial's
                    # own: when it ends, they end.
                    reuse_actors=here,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder.parent),
                    stop=Stopper(recorder.stop),
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
        with stopping_on_signal(recorder.stop.set) as caught:
            thread = threading.Thread(target=run_tuner, name="tune", daemon=True)
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
    for key in trainer.SETTINGS_WITHOUT_EFFECT:
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


def _prepare(space: Space) -> list[str]:
    """Prepare the data that all trials share, of each fold; empty if the space has them differ."""
    if any(key in WHOLE_MODEL or key.split(".")[0] in ("data", "features") for key in space.sweep.space):
        return []
    base, folds = space.base, space.sweep.folds
    parts = [with_fold(base, i, folds) for i in range(folds)] if folds else [base]
    return [str(prepare(part).path) for part in parts]


def _less_one_cpu(per_worker: Mapping[str, float]) -> dict[str, float]:
    """What a trial claims that prepares data: so much less than it takes that each node has a CPU left.

    Ray Data's tasks would wait for one forever, as the trial waits for them.
    """
    smallest = min(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])
    there = capacity.current()
    smallest = max(1.0, smallest - (there.total - there.left_by_endpoints()))
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
    rooms = [int(capacity.current().left_by_endpoints() / cores + 1e-9)]
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
            files.discard(home() / "runs" / run)
