"""How fast the training is, against what people would use instead.

    python benchmarks/bench_train.py [--rounds 5] [--only step_mlp,step_minilm,...]

Two workers with one thread each, the same network, rows, batches and niceness on both sides, rounds that take
turns, ratios of medians; low and high are the smallest and largest ratio of a round. The last line is JSON.
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

BIN = Path(sys.executable).parent
PEER = Path(__file__).with_name("train_peer.py")
PLAIN_MLP = ("model={kind: mlp, hidden: [128, 64]}", "training.batch_size=64")
SMALL_MLP = ("model={kind: mlp, hidden: [128, 128, 128, 128, 128, 128, 128, 128]}", "training.batch_size=64")
TURNS = 140
"""Epochs of a round, every other one with report and checkpoint: single ones vary by a tenth and more."""
FEW_TWEETS = ("data.split.validation=0.01", "data.split.test=0.965", "training.precision=fp32")
"""About 950 rows to train on. A limit would take the first, which are all of one class."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help=f"of {', '.join(MEASURES)}")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else list(MEASURES)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="raylway-bench-") as home:
        os.environ["RAYLWAY_HOME"] = home
        from app.cluster.session import session

        with session(log_to_driver=False):
            ratios: dict[str, Any] = {}
            for name in wanted:
                ratios |= MEASURES[name](arguments.rounds)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    print(json.dumps({"benchmark": "train", "machine": machine, "ratios": ratios}))


# What is measured


def step_mlp(rounds: int) -> dict[str, Any]:
    return _step_times("mlp", "configs/income.yaml", (*SMALL_MLP, "training.epochs=6"), rounds, "flat")


def step_minilm(rounds: int) -> dict[str, Any]:
    settings = (*FEW_TWEETS, "training.epochs=3")
    return _step_times("minilm", "configs/tweets.yaml", settings, rounds, "horovod")


def checkpointing(rounds: int) -> dict[str, Any]:
    """From the middle of an epoch to the middle of the next, by turns in one training: what the end of an
    epoch costs, with what is then written behind."""
    project, prepared = _prepared("configs/income.yaml", (*PLAIN_MLP, f"training.epochs={TURNS + 1}"))
    found: Rounds = {"with": [], "without": []}
    for _ in range(rounds):
        between = _ours(project, prepared, take_turns=True)["between_s"]
        for i, how in enumerate(found):
            found[how].append(statistics.median(between[i + 2 :: 2]))  # the first ones are still warming up
            _say(f"epoch {how} report and checkpoint: {found[how][-1] * 1e3:.0f} ms")
    return _ratio("epoch_with_checkpoint_vs_without", found["with"], found["without"])


def blocking(rounds: int) -> dict[str, Any]:
    """How long `Checkpoints.save` keeps a rank, against writing the same before going on."""
    ratios = {}
    for name, file, settings in (
        ("mlp", "configs/income.yaml", SMALL_MLP),
        ("minilm", "configs/tweets.yaml", FEW_TWEETS),
    ):
        found = _blocked(*_prepared(file, settings), rounds=max(rounds, 10))
        ratios |= _ratio(
            f"blocked_by_checkpoint_vs_synchronous_{name}", found["behind"], found["synchronous"]
        )
    return ratios


def scaling(rounds: int) -> dict[str, Any]:
    """Rows per second of two workers against one, each with the same batch."""
    found: Rounds = {"1": [], "2": []}
    for _ in range(rounds):
        for workers in found:
            settings = (f"training.num_workers={workers}", "training.batch_size=4096", "training.epochs=9")
            model = "model={kind: mlp, hidden: [512, 512]}"
            run = _ours(*_prepared("configs/income.yaml", (model, *settings)))
            found[workers].append(statistics.median(run["rows_per_s"][1:]))
            _say(f"{workers} workers: {found[workers][-1]:,.0f} rows/s")
    return _ratio("two_workers_vs_one", found["2"], found["1"])


def start(rounds: int) -> dict[str, Any]:
    """From `fit()`, or from starting torchrun, to the end of the first step."""
    project, prepared = _prepared("configs/income.yaml", (*SMALL_MLP, "training.epochs=1"))
    found: Rounds = {"ours": [], "torchrun": []}
    for _ in range(rounds):
        found["ours"].append(_ours(project, prepared)["start_s"])
        found["torchrun"].append(_peer("ddp", project, prepared)["start_s"])
        _say(f"to the first step: ours {found['ours'][-1]:.1f} s, torchrun {found['torchrun'][-1]:.1f} s")
    return _ratio("start_vs_torchrun", found["ours"], found["torchrun"])


MEASURES: dict[str, Callable[[int], dict[str, Any]]] = {
    function.__name__: function
    for function in (step_mlp, step_minilm, checkpointing, blocking, scaling, start)
}

# How


def _step_times(name: str, file: str, settings: tuple[str, ...], rounds: int, bare: str) -> dict[str, Any]:
    """`bare` is the plain Horovod loop to compare with: the better one for this size of network."""
    project, prepared = _prepared(file, settings)
    found: Rounds = {"ours": [], "ddp": [], bare: []}
    for _ in range(rounds):
        found["ours"].append(statistics.median(_ours(project, prepared)["step_s"][1:]))
        for peer in ("ddp", bare):
            found[peer].append(statistics.median(_peer(peer, project, prepared)["step_s"][1:]))
        _say(f"step of {name}: " + ", ".join(f"{k} {v[-1] * 1e3:.2f} ms" for k, v in found.items()))
    return _ratio(f"step_time_vs_ddp_{name}", found["ours"], found["ddp"]) | _ratio(
        f"step_time_vs_horovodrun_{name}", found["ours"], found[bare]
    )


def _prepared(file: str, settings: tuple[str, ...]) -> tuple[Any, Any]:
    from app.config import projectfile
    from app.data.prepare import prepare

    project = projectfile.load(file, ("training.num_workers=2", *settings))
    return project, prepare(project)


def _ours(project: Any, prepared: Any, *, take_turns: bool = False) -> dict[str, Any]:
    """A training as `raylway train` does it; with `take_turns`, every other epoch ends silently."""
    from app.state.home import home
    from app.training.workers.fit import fit

    notes = home() / f"{time.time_ns()}.json"
    run = home() / "runs" / notes.stem
    begun = time.time()
    fit(project, prepared, run, _ignore, _ignore, threading.Event(), _watched(str(notes), take_turns))
    epochs = json.loads(notes.read_text())
    step_s = [(steps[-1] - steps[0]) / (len(steps) - 1) for steps in epochs]
    rows = project.training.batch_size * project.training.max_workers
    return {
        "step_s": step_s,
        "between_s": [
            after[len(after) // 2] - before[len(before) // 2] for before, after in itertools.pairwise(epochs)
        ],
        "rows_per_s": [rows / seconds for seconds in step_s],
        "start_s": epochs[0][0] - begun,
    }


def _watched(notes: str, take_turns: bool) -> Callable[[Any], Any]:
    """For `fit`: an observer that also notes when each step was done, by epoch."""

    def wrap(observer: Any) -> Any:
        import ray.train

        from app.training.checkpoint import Checkpoints

        epochs: dict[int, list[float]] = {}
        normal_save = Checkpoints.save

        class Noting:
            def __getattr__(self, name: str) -> Any:
                return getattr(observer, name)

            def step(self, epoch: int, step: int) -> None:
                epochs.setdefault(epoch, []).append(time.time())

            def epoch(self, metrics: dict[str, float]) -> None:
                if not take_turns or len(epochs) % 2 == 1:
                    observer.epoch(metrics)

            def end(self, ending: Any) -> None:
                if ray.train.get_context().get_world_rank() == 0:
                    Path(notes).write_text(json.dumps(list(epochs.values())))
                observer.end(ending)

        def save(self: Checkpoints, *arguments: Any) -> None:
            if len(epochs) % 2 == 1:
                normal_save(self, *arguments)

        if take_turns:
            Checkpoints.save = save  # type: ignore[method-assign]
        return Noting()

    return wrap


def _peer(backend: str, project: Any, prepared: Any) -> dict[str, Any]:
    launcher = {
        "ddp": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    }.get(backend, ["horovodrun", "--gloo", "-np", "2", sys.executable])
    with tempfile.TemporaryDirectory() as folder:
        settings, output = Path(folder) / "settings.json", Path(folder) / "output.json"
        content = {"project": project.model_dump(mode="json"), "prepared": str(prepared.path)}
        settings.write_text(json.dumps(content))
        begun = time.time()
        command = [str(BIN / launcher[0]), *launcher[1:], str(PEER), backend, str(settings), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, env=_peer_environment())
        if not output.exists():
            sys.exit(f"{launcher[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found = json.loads(output.read_text())
    return {"step_s": found["step_s"], "start_s": found["first_step"] - begun}


def _peer_environment() -> dict[str, str]:
    paths = [str(PEER.parents[1]), os.environ.get("PYTHONPATH", "")]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PATH": path}


def _blocked(project: Any, prepared: Any, rounds: int) -> Rounds:
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
    found: Rounds = {"behind": [], "synchronous": []}
    for round_ in range(rounds):
        groups = {"model": network.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
        state = {"epoch": round_, "step": 0, "score": None}
        begun = time.perf_counter()
        checkpoints.save(groups, state)
        found["behind"].append(time.perf_counter() - begun)
        checkpoints.wait()
        begun = time.perf_counter()
        checkpoint.write(folder, checkpoint.Snapshot(groups, {**state, "step": 1}))
        found["synchronous"].append(time.perf_counter() - begun)
    medians = {how: statistics.median(seconds) for how, seconds in found.items()}
    _say(f"blocked: {medians['behind'] * 1e3:.1f} ms, synchronous {medians['synchronous'] * 1e3:.1f} ms")
    return found


def _ratio(name: str, ours: list[float], peers: list[float]) -> dict[str, Any]:
    goal, better = GOALS[name]
    value = statistics.median(ours) / statistics.median(peers)
    each = [a / b for a, b in zip(ours, peers, strict=True)]
    holds = value <= goal if better == "lower" else value >= goal
    figures = {"value": value, "low": min(each), "high": max(each), "goal": goal}
    entry = {k: round(v, 3) for k, v in figures.items()} | {"better": better, "holds": holds}
    _say(f"{name}: {entry}")
    return {name: entry}


def _say(text: str) -> None:
    print(text, flush=True)


def _ignore(_: Any) -> None:
    pass


if __name__ == "__main__":
    main()
