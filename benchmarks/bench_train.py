"""Speed of training, against PyTorch DDP under torchrun and plain Horovod loops under horovodrun.

    python benchmarks/bench_train.py [--rounds 5] [--only step_mlp,step_minilm,...]

Both sides run two workers with one thread each, with the same network, rows, batches and niceness, and
alternate within each round. `value` is the ratio of the medians, `low` and `high` the smallest and largest
ratio of one round. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from ratios import ratio

BIN = Path(sys.executable).parent
PEER = Path(__file__).with_name("train_peer.py")
PLAIN_MLP = ("model={kind: mlp, hidden: [128, 64]}", "training.batch_size=64")
SMALL_MLP = ("model={kind: mlp, hidden: [128, 128, 128, 128, 128, 128, 128, 128]}", "training.batch_size=64")
NUM_EPOCHS = 140
"""Epochs of one round of `checkpointing`; every other epoch reports and saves a checkpoint. Many are needed,
because single epochs vary by 10 % and more."""
FEW_TWEETS = ("data.split.validation=0.01", "data.split.test=0.965", "training.precision=fp32")
"""Leaves about 950 rows to train on. `data.source.limit` would take the first ones, all of one class."""
GOALS = {
    "step_time_vs_ddp_mlp": (1.2, "lower"),
    "step_time_vs_horovodrun_mlp": (1.02, "lower"),
    "step_time_vs_ddp_minilm": (1.05, "lower"),
    "step_time_vs_horovodrun_minilm": (1.02, "lower"),
    "epoch_with_checkpoint_vs_without": (1.025, "lower"),
    "blocked_by_checkpoint_vs_synchronous_mlp": (0.25, "lower"),
    "blocked_by_checkpoint_vs_synchronous_minilm": (0.25, "lower"),
    "two_workers_vs_one": (1.8, "higher"),
    "start_vs_torchrun": (1.5, "lower"),
}

Rounds = dict[str, list[float]]


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help=f"comma-separated, from {', '.join(MEASURES)}")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(MEASURES)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="raylway-bench-") as home:
        os.environ["RAYLWAY_HOME"] = home
        from app.cluster.session import session

        with session(log_to_driver=False):
            ratios: dict[str, Any] = {}
            for name in names:
                ratios |= MEASURES[name](arguments.rounds)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    print(json.dumps({"benchmark": "train", "machine": machine, "ratios": ratios}))


# The measurements


def step_mlp(rounds: int) -> dict[str, Any]:
    return _step_times("mlp", "configs/income.yaml", (*SMALL_MLP, "training.epochs=6"), rounds, "flat")


def step_minilm(rounds: int) -> dict[str, Any]:
    settings = (*FEW_TWEETS, "training.epochs=3")
    return _step_times("minilm", "configs/tweets.yaml", settings, rounds, "horovod")


def checkpointing(rounds: int) -> dict[str, Any]:
    """Time of an epoch that reports and saves a checkpoint, against one that does neither, alternating in one
    training. An epoch is measured from its middle to the middle of the next, so that the writing of the
    checkpoint in the background is included.
    """
    project, prepared = _prepared("configs/income.yaml", (*PLAIN_MLP, f"training.epochs={NUM_EPOCHS + 1}"))
    epoch_s: Rounds = {"with": [], "without": []}
    for _ in range(rounds):
        between = _ours(project, prepared, alternate=True)["between_s"]
        for i, kind in enumerate(epoch_s):
            epoch_s[kind].append(statistics.median(between[i + 2 :: 2]))  # the first two warm up
            print(f"epoch {kind} report and checkpoint: {epoch_s[kind][-1] * 1e3:.0f} ms")
    return ratio(GOALS, "epoch_with_checkpoint_vs_without", epoch_s["with"], epoch_s["without"])


def blocking(rounds: int) -> dict[str, Any]:
    """Time for which `Checkpoints.save` blocks a rank, against writing the same checkpoint synchronously."""
    ratios = {}
    for name, file, settings in (
        ("mlp", "configs/income.yaml", SMALL_MLP),
        ("minilm", "configs/tweets.yaml", FEW_TWEETS),
    ):
        seconds = _blocked(*_prepared(file, settings), rounds=max(rounds, 10))
        ratios |= ratio(
            GOALS,
            f"blocked_by_checkpoint_vs_synchronous_{name}",
            seconds["background"],
            seconds["synchronous"],
        )
    return ratios


def scaling(rounds: int) -> dict[str, Any]:
    """Rows per second of two workers against one; the batch of each worker has the same size."""
    rows_per_s: Rounds = {"1": [], "2": []}
    for _ in range(rounds):
        for workers in rows_per_s:
            settings = (f"training.num_workers={workers}", "training.batch_size=4096", "training.epochs=9")
            model = "model={kind: mlp, hidden: [512, 512]}"
            run = _ours(*_prepared("configs/income.yaml", (model, *settings)))
            rows_per_s[workers].append(statistics.median(run["rows_per_s"][1:]))
            print(f"{workers} workers: {rows_per_s[workers][-1]:,.0f} rows/s")
    return ratio(GOALS, "two_workers_vs_one", rows_per_s["2"], rows_per_s["1"])


def start(rounds: int) -> dict[str, Any]:
    """Time from calling `fit()`, or from starting torchrun, to the end of the first step."""
    project, prepared = _prepared("configs/income.yaml", (*SMALL_MLP, "training.epochs=1"))
    start_s: Rounds = {"ours": [], "torchrun": []}
    for _ in range(rounds):
        start_s["ours"].append(_ours(project, prepared)["start_s"])
        start_s["torchrun"].append(_peer("ddp", project, prepared)["start_s"])
        print(f"first step done: ours {start_s['ours'][-1]:.1f} s, torchrun {start_s['torchrun'][-1]:.1f} s")
    return ratio(GOALS, "start_vs_torchrun", start_s["ours"], start_s["torchrun"])


MEASURES: dict[str, Callable[[int], dict[str, Any]]] = {
    function.__name__: function
    for function in (step_mlp, step_minilm, checkpointing, blocking, scaling, start)
}

# How they are measured


def _step_times(name: str, file: str, settings: tuple[str, ...], rounds: int, horovod: str) -> dict[str, Any]:
    """Compare step times. `horovod` names the plain Horovod loop that is faster for this size of network."""
    project, prepared = _prepared(file, settings)
    step_s: Rounds = {"ours": [], "ddp": [], horovod: []}
    for _ in range(rounds):
        step_s["ours"].append(statistics.median(_ours(project, prepared)["step_s"][1:]))
        for peer in ("ddp", horovod):
            step_s[peer].append(statistics.median(_peer(peer, project, prepared)["step_s"][1:]))
        print(f"step of {name}: " + ", ".join(f"{k} {v[-1] * 1e3:.2f} ms" for k, v in step_s.items()))
    return ratio(GOALS, f"step_time_vs_ddp_{name}", step_s["ours"], step_s["ddp"]) | ratio(
        GOALS, f"step_time_vs_horovodrun_{name}", step_s["ours"], step_s[horovod]
    )


def _prepared(file: str, settings: tuple[str, ...]) -> tuple[Any, Any]:
    from app.config import projectfile
    from app.data.prepare import prepare

    project = projectfile.load(file, ("training.num_workers=2", *settings))
    return project, prepare(project)


def _ours(project: Any, prepared: Any, *, alternate: bool = False) -> dict[str, Any]:
    """Times of one training by `fit`. With `alternate`, every other epoch neither reports nor saves."""
    from app.state.home import home
    from app.training.workers.fit import fit

    step_times = home() / f"{time.time_ns()}.json"
    run = home() / "runs" / step_times.stem
    started = time.time()
    wrap = _timing_observer(str(step_times), alternate)
    fit(project, prepared, run, _ignore, _ignore, threading.Event(), wrap)
    epochs = json.loads(step_times.read_text())
    step_s = [(steps[-1] - steps[0]) / (len(steps) - 1) for steps in epochs]
    rows = project.training.batch_size * project.training.max_workers
    return {
        "step_s": step_s,
        "between_s": [
            after[len(after) // 2] - before[len(before) // 2] for before, after in itertools.pairwise(epochs)
        ],
        "rows_per_s": [rows / seconds for seconds in step_s],
        "start_s": epochs[0][0] - started,
    }


def _timing_observer(output: str, alternate: bool) -> Callable[[Any], Any]:
    """A wrapper for the observer of `fit`. It writes the end times of steps, by epoch, to `output`."""

    def wrap(observer: Any) -> Any:
        import ray.train

        from app.training.checkpoint import Checkpoints

        epochs: dict[int, list[float]] = {}
        original_save = Checkpoints.save

        class TimingObserver:
            def __getattr__(self, name: str) -> Any:
                return getattr(observer, name)

            def step(self, epoch: int, step: int) -> None:
                epochs.setdefault(epoch, []).append(time.time())

            def epoch(self, metrics: dict[str, float]) -> None:
                if not alternate or len(epochs) % 2 == 1:
                    observer.epoch(metrics)

            def end(self, ending: Any) -> None:
                if ray.train.get_context().get_world_rank() == 0:
                    Path(output).write_text(json.dumps(list(epochs.values())))
                observer.end(ending)

        def save(self: Checkpoints, *arguments: Any) -> None:
            if len(epochs) % 2 == 1:
                original_save(self, *arguments)

        if alternate:
            Checkpoints.save = save  # type: ignore[method-assign]
        return TimingObserver()

    return wrap


def _peer(backend: str, project: Any, prepared: Any) -> dict[str, Any]:
    launcher = {
        "ddp": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    }.get(backend, ["horovodrun", "--gloo", "-np", "2", sys.executable])
    with tempfile.TemporaryDirectory() as folder:
        settings, output = Path(folder) / "settings.json", Path(folder) / "output.json"
        content = {"project": project.model_dump(mode="json"), "prepared": str(prepared.path)}
        settings.write_text(json.dumps(content))
        started = time.time()
        command = [str(BIN / launcher[0]), *launcher[1:], str(PEER), backend, str(settings), str(output)]
        process = subprocess.run(command, capture_output=True, text=True, env=_peer_environment())
        if not output.exists():
            sys.exit(f"{launcher[0]} failed:\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
        times = json.loads(output.read_text())
    return {"step_s": times["step_s"], "start_s": times["first_step"] - started}


def _peer_environment() -> dict[str, str]:
    paths = [str(PEER.parents[1]), os.environ.get("PYTHONPATH", "")]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PATH": path}


def _blocked(project: Any, prepared: Any, rounds: int) -> Rounds:
    """Seconds for which a checkpoint blocks a rank, when written in the background and synchronously."""
    import torch

    from app.state.home import home
    from app.tasks import task_of
    from app.training import checkpoint

    torch.set_num_threads(1)
    task = task_of(project, prepared)
    network = task.network()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    folder = home() / "blocked"
    checkpoints = checkpoint.Checkpoints(folder, project.training.checkpoints)
    blocked_s: Rounds = {"background": [], "synchronous": []}
    for round_ in range(rounds):
        groups = {"model": network.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
        state = {"epoch": round_, "step": 0, "score": None}
        started = time.perf_counter()
        checkpoints.save(groups, state)
        blocked_s["background"].append(time.perf_counter() - started)
        checkpoints.wait()
        started = time.perf_counter()
        checkpoint.write(folder, checkpoint.Snapshot(groups, {**state, "step": 1}))
        blocked_s["synchronous"].append(time.perf_counter() - started)
    medians = {kind: statistics.median(seconds) for kind, seconds in blocked_s.items()}
    print(
        f"a checkpoint blocks for {medians['background'] * 1e3:.1f} ms, "
        f"synchronously for {medians['synchronous'] * 1e3:.1f} ms"
    )
    return blocked_s


def _ignore(_: Any) -> None:
    pass


if __name__ == "__main__":
    main()
