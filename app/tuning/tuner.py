"""Runs a sweep to its end, from its start or from its stored trials. Ray Tune runs the trials."""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import TrialScheduler

from app.config import Project
from app.config.sweep import SWEPT
from app.data.prepare import prepare
from app.errors import Interrupted, UserError
from app.state import files
from app.state.home import home
from app.training import trainer
from app.training.signals import stopping_on_signal
from app.tuning import plan
from app.tuning import study as studies
from app.tuning.placement import Placement, place
from app.tuning.progress import Progress, Watch
from app.tuning.recorder import Recorder, Stopper
from app.tuning.scheduler import restore_rungs, scheduler_of
from app.tuning.search import Search
from app.tuning.space import Space
from app.tuning.trial import Trial, with_fold

TUNE_ENVIRONMENT = {
    # Tune's own logs and snapshots cost a third of a second per trial, and the study replaces them.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Environment variables with which Tune runs."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""States of a finished trial."""


def run(
    project: Project,
    watch: Watch,
    on_note: Callable[[str], None],
    on_trial: Callable[[FrozenTrial], None] = lambda _: None,
) -> Progress:
    """Run a project's sweep until `sweep.trials` trials, including stored ones, are finished. Needs Ray.

    `watch` is called after each change, `on_note` with lines for the user, `on_trial` with each finished
    trial, those of earlier calls first. Raises UserError if the space contradicts itself, if another sweep
    has the study, if the study was started with other settings, or if the database stays unreachable;
    Interrupted on SIGTERM or SIGINT, after everything is stored.
    """
    space = Space(project)
    space.check()
    sweep = space.sweep
    name = sweep.study or project.name
    with studies.opened(name, sweep.directions, shared_settings(space), on_note) as study:
        stored = study.trials()
        finished = [trial for trial in stored if trial.state in FINISHED]
        progress = Progress(
            name, sweep.trials, sweep.objectives, list(sweep.directions), finished, num_earlier=len(finished)
        )
        for trial in finished:
            on_trial(trial)
        watch(progress)
        recorder = Recorder(sweep, study, progress, watch, on_trial)
        signals: list[int] = []
        if len(finished) < sweep.trials and not recorder.is_over():
            points = plan.planned_points(space, stored)
            if sweep.search == "grid":
                progress.num_trials = min(sweep.trials, len(finished) + len(points))
            to_learn_from = plan.informative_trials(space, finished)
            search = Search(space, study, points, to_learn_from, recorder.may_start)
            scheduler = scheduler_of(sweep)
            restore_rungs(scheduler, finished, sweep)
            signals = _run_tune(space, search, scheduler, recorder, progress, on_note)
        _discard_checkpoints(progress)
    if signals:
        raise Interrupted(f"{len(progress.trials)} of {progress.num_trials} trials are stored", signals[0])
    return progress


def _run_tune(
    space: Space,
    search: Search,
    scheduler: TrialScheduler,
    recorder: Recorder,
    progress: Progress,
    on_note: Callable[[str], None],
) -> list[int]:
    """Have Ray Tune run the remaining trials; returns the signals received meanwhile."""
    shares_data = _shares_data(space)
    placement = place(space, trials_prepare=not shares_data, on_note=on_note)
    recorder.attach(search.numbers, placement.cores_per_trial)
    settings = {
        "home": str(home()),
        "project": space.base.model_copy(update={"sweep": space.sweep}).model_dump_json(exclude_unset=True),
        "prepared": _prepare(space) if shares_data else [],
        "in_process": placement.in_process,
    }
    errors: list[BaseException] = []

    def run_tuner() -> None:
        try:
            _tuner(space, search, scheduler, recorder, progress, placement, settings).fit()
        except BaseException as error:
            errors.append(error)

    with _environment(progress.study), stopping_on_signal(recorder.stop.set) as signals:
        # In a daemon thread: Tune in the main thread would delay the handling of signals, and after a second
        # signal the process must not wait for Tune.
        thread = threading.Thread(target=run_tuner, name="tune", daemon=True)
        thread.start()
        noted = False
        while thread.is_alive():
            thread.join(0.2)
            if signals and not noted:
                on_note("stopping; running trials write a checkpoint. The same signal again stops at once")
                noted = True
    if errors:
        raise _user_error(errors[0]) or errors[0]
    return signals


def _tuner(
    space: Space,
    search: Search,
    scheduler: TrialScheduler,
    recorder: Recorder,
    progress: Progress,
    placement: Placement,
    settings: dict[str, Any],
) -> tune.Tuner:
    """Ray's tuner for the remaining trials."""
    sweep = space.sweep
    has_several = len(sweep.objectives) > 1
    is_population = sweep.effective_scheduler.kind == "pbt"
    folder = _folder(progress.study)
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(Trial, settings=settings), placement.claim),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            metric=None if has_several else sweep.objectives[0],
            mode=None if has_several else sweep.directions[0][:3],
            num_samples=progress.num_trials - progress.num_earlier,
            # A population starts as a whole; members for which there is no room take turns.
            max_concurrent_trials=sweep.trials if is_population else placement.max_concurrent,
            # Starting a process takes seconds. But Ray Train's workers end only with the process that started
            # them, so trials with such workers get a new process each.
            reuse_actors=placement.in_process,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            stop=Stopper(recorder.stop),
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _folder(study: str) -> Path:
    """Folder that Tune writes to while it runs."""
    return home() / "sweeps" / study / "tune"


@contextmanager
def _environment(study: str) -> Iterator[None]:
    """Set environment variables and log level for Tune, and empty its folder.

    At the end of the block, restores the variables and removes the folder.
    """
    folder = _folder(study)
    shutil.rmtree(folder, ignore_errors=True)
    previous = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    os.environ.update(TUNE_ENVIRONMENT)
    # Tune would warn that files are missing; TUNE_ENVIRONMENT turns them off.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _user_error(error: BaseException) -> UserError | None:
    """The UserError that Tune has wrapped in an error of its own; None if it is another error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def shared_settings(space: Space) -> dict[str, Any]:
    """The settings that the trials of a study must have in common, so that their values can be compared."""
    sweep_keys = {"space", "constraints", "objectives", "folds"}
    document = space.base.model_dump(mode="json", include=set(SWEPT))
    for key in trainer.SETTINGS_WITHOUT_EFFECT:
        del document["training"][key]
    for key in space.sweep.space:
        _remove(document, key.split("."))
    return {"sweep": space.sweep.model_dump(mode="json", include=sweep_keys), "project": document}


def _remove(document: Any, path: Sequence[str]) -> None:
    """Remove a key, if the document has it."""
    for part in path[:-1]:
        document = document.get(part) if isinstance(document, dict) else None
    if isinstance(document, dict):
        document.pop(path[-1], None)


def _shares_data(space: Space) -> bool:
    """Whether all trials train on the same prepared data."""
    model_keys = {"model", "model.kind", *(f"model.{name}" for name in space.base.model.data_settings)}
    return not any(
        key in model_keys or key.split(".")[0] in ("data", "features") for key in space.sweep.space
    )


def _prepare(space: Space) -> list[str]:
    """Prepare the data that all trials share; returns the folder of each fold."""
    base, num_folds = space.base, space.sweep.folds
    projects = [with_fold(base, i, num_folds) for i in range(num_folds)] if num_folds else [base]
    return [str(prepare(project).path) for project in projects]


def _discard_checkpoints(progress: Progress) -> None:
    """Remove the checkpoints of finished trials."""
    for trial in progress.trials:
        if run := trial.user_attrs.get("run"):
            files.discard(home() / "runs" / run)
