"""The overhead of a sweep beside its trainings, and the epochs that its search saves.

    python benchmarks/bench_sweep.py [--rounds 3] [--seeds 5] [--only pool,trivial,search]

pool: wall time of 64 trials of about 5 s, against plain Optuna in two processes that run the same trainings.
trivial: wall time of a trial that trains on a few rows.
search: epochs that TPE with ASHA needs to reach the best score of a random search without early stopping, as
a share of the epochs of that random search.
The last line is JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from ratios import entry

TRIALS = 64
PROCESSES = 2
RATE = {"type": "float", "low": 0.0005, "high": 0.02, "log": True}
DECAY = {"type": "float", "low": 0.0001, "high": 0.1, "log": True}
ONE_WORKER = {"training.num_workers": 1, "training.batch_size": 128, "model.hidden": [128, 64]}
SPACE = {
    "training.learning_rate": {"type": "float", "low": 0.0001, "high": 0.1, "log": True},
    "training.weight_decay": {"type": "float", "low": 0.00001, "high": 0.3, "log": True},
    "model.hidden": {"type": "choice", "values": [[32], [128], [64, 64], [256, 256]]},
    "model.dropout": {"type": "float", "low": 0.0, "high": 0.6},
    "model.numbers.embed": {"type": "choice", "values": ["none", "periodic"]},
    "model.numbers.scale": {
        **{"type": "float", "low": 0.01, "high": 1.0, "log": True},
        "when": {"model.numbers.embed": "periodic"},
    },
}
RANDOM_TRIALS = 27
GOALS = {
    "wall_time_vs_optuna_pool": (1.2, "lower"),
    "seconds_per_trivial_trial": (1.0, "lower"),
    "epochs_to_the_best_of_random_search": (0.5, "lower"),
}


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="pool,trivial,search", help="comma-separated")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    ratios: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raylway-bench-") as home:
        os.environ["RAYLWAY_HOME"] = home
        from app.cluster.session import session

        with session(log_to_driver=False):
            for name in arguments.only.split(","):
                ratios |= MEASURES[name](arguments)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    print(json.dumps({"benchmark": "sweep", "machine": machine, "ratios": ratios}))


def pool(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall time of the same number of trials, against plain Optuna in a pool of processes."""
    settings = {**ONE_WORKER, "training.epochs": 8, "data.source.limit": 30_000}
    ours, theirs = [], []
    for round_ in range(arguments.rounds):
        space = {"training.learning_rate": RATE, "training.weight_decay": DECAY}
        project = _project(f"ours-{round_}", space, set=settings, seed=2 * round_, trials=TRIALS)
        ours.append(_timed(lambda: _sweep(project)))  # noqa: B023
        project = _project(f"theirs-{round_}", space, set=settings, seed=2 * round_ + 1, trials=TRIALS)
        theirs.append(_timed(lambda: _optuna(project)))  # noqa: B023
        print(f"{TRIALS} trials: ours {ours[-1]:.1f} s, Optuna in a pool {theirs[-1]:.1f} s")
    value = statistics.median(ours) / statistics.median(theirs)
    return entry(GOALS, "wall_time_vs_optuna_pool", value, [a / b for a, b in zip(ours, theirs, strict=True)])


def trivial(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall time of a whole sweep, start and end included, divided by its trials; two trials run at a time."""
    settings = {**ONE_WORKER, "training.epochs": 1, "data.source.limit": 1000, "model.hidden": [8]}
    seconds = []
    for round_ in range(arguments.rounds):
        project = _project(f"trivial-{round_}", {"training.learning_rate": RATE}, set=settings, trials=TRIALS)
        seconds.append(_timed(lambda: _sweep(project)) / TRIALS)  # noqa: B023
        print(f"a trivial trial: {seconds[-1]:.3f} s")
    return entry(GOALS, "seconds_per_trivial_trial", statistics.median(seconds), seconds)


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    """Epochs that TPE with ASHA needs for the best score of a random search, divided by its epochs."""
    shares = []
    for seed in range(arguments.seeds):
        settings = {
            **{"training.num_workers": 1, "training.batch_size": 128, "training.epochs": 9},
            **{"data.source.limit": 10_000, "data.split.validation": 0.3, "data.split.seed": seed},
        }
        random_search = {"search": "random", "scheduler": {"kind": "none"}, "trials": RANDOM_TRIALS}
        by_random = _sweep(_project(f"random-{seed}", SPACE, set=settings, seed=2 * seed, **random_search))
        best = by_random.best()[0].values[0]
        # Same rows and initial weights, but another seed for the sweep: with the same one, TPE would start
        # with the points of the random search.
        tpe = {"trials": 6 * RANDOM_TRIALS, "target": best, "startup_trials": 8}
        by_tpe = _sweep(
            _project(f"tpe-{seed}", SPACE, set=settings, seed=2 * seed, sweep_seed=2 * seed + 1, **tpe)
        )
        shares.append(_epochs(by_tpe) / _epochs(by_random))
        print(
            f"seed {seed}: random {best:.4f} in {_epochs(by_random)} epochs; TPE with ASHA "
            f"{by_tpe.best()[0].values[0]:.4f} in {_epochs(by_tpe)} ({len(by_tpe.trials)} trials)"
        )
    return entry(GOALS, "epochs_to_the_best_of_random_search", statistics.median(shares), shares)


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    function.__name__: function for function in (pool, trivial, search)
}


def _project(
    study: str, space: dict[str, Any], *, seed: int = 0, sweep_seed: int | None = None, **sweep: Any
) -> Any:
    from app.config import Project, projectfile

    document = projectfile.load("configs/income.yaml").model_dump(mode="json", exclude_unset=True)
    settings = {"study": study, "seed": sweep_seed, "scheduler": {"kind": "none"}, **sweep, "space": space}
    if "target" in sweep:
        del settings["scheduler"]  # the default is ASHA
    return Project.model_validate({**document, "seed": seed, "sweep": settings})


def _sweep(project: Any) -> Any:
    from app.tuning import tuner

    return tuner.run(project, lambda _: None, print)


def _optuna(project: Any) -> None:
    """The peer: a study in SQLite, and a pool of processes that share its trials."""
    import optuna

    from app.state.home import home
    from app.tuning.space import Space

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{home() / 'peer.db'}"
    study = optuna.create_study(storage=storage, study_name=project.sweep.study, direction="maximize")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as executor:
        from app.data.prepare import prepare

        path = str(prepare(Space(project).base).path)
        arguments = (project.model_dump_json(exclude_unset=True), path, storage, TRIALS // PROCESSES)
        futures = [executor.submit(_optimize, *arguments, seed) for seed in range(PROCESSES)]
        for future in futures:
            future.result()
    assert len(study.trials) == TRIALS


def _optimize(document: str, prepared: str, storage: str, count: int, seed: int) -> None:
    import optuna

    from app.config import Project
    from app.data.prepare import Prepared
    from app.tuning.space import Space

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    project = Project.model_validate_json(document)
    space = Space(project)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.load_study(storage=storage, study_name=project.sweep.study, sampler=sampler)

    def objective(trial: Any) -> float:
        from app.training import trainer

        trial_project = space.project(space.suggest(trial))

        def on_epoch(metrics: dict[str, float]) -> None:
            trial.report(metrics["validation_auc"], int(metrics["epoch"]))

        trained = trainer.train(
            trial_project,
            Prepared(Path(prepared), cached=True),
            on_epoch,
            stop=threading.Event(),
            in_process=True,
        )
        return max(metrics["validation_auc"] for metrics in trained.history)

    with contextlib.redirect_stdout(sys.stderr):
        study.optimize(objective, n_trials=count)


def _epochs(progress: Any) -> int:
    """Number of epochs of all trials, including those that were stopped early."""
    running = sum(r.epochs for r in progress.running.values())
    return sum(trial.user_attrs.get("epochs", 0) for trial in progress.trials) + running


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
