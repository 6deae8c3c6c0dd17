"""Kill or stop processes of trainings at random times, many times, and measure the lost work."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import psutil
import pytest

from app.config import projectfile
from tests.integration.conftest import ROOT
from tests.integration.test_training import check_same, train

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NUM_KILLS = 20
"""Number of kills of a rank in one training."""
NUM_STARTS, NUM_ROUNDS = 10, 5
"""Number of kills of the command in one training, and number of such trainings."""

CHECKPOINT_STEPS = 20
"""Steps between two checkpoints."""
STEPS = 65
"""Number of steps of one epoch."""
STEP_PAUSE_S = 0.02
"""Pause after each step, so that a kill can hit any step; a step itself takes about 1 ms."""


def project_of(*overrides: str):
    settings = ("data.source.limit=3000", "training.batch_size=16", f"training.max_failures={2 * NUM_KILLS}")
    return projectfile.load("configs/smoke.yaml", [*settings, *overrides])


@pytest.fixture(scope="module")
def prepared(ray_cluster):
    from app.data.prepare import prepare

    return prepare(project_of())


def wait_until(condition, timeout_s: float = 400.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s"
        time.sleep(0.02)


@contextlib.contextmanager
def in_background(function):
    """Run a function in a thread during the block; its exception is raised at the end."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function)
        yield
        future.result()


def note_positions(folder):
    """An `on_begin`: rank 0 notes the step at which its group resumes, and the steps made before."""

    def on_begin(rank, epoch, step):
        import json

        if rank == 0:
            num_steps = max(file.stat().st_size for file in folder.glob("steps-*"))
            with (folder / "positions").open("a") as file:
                file.write(json.dumps([epoch * STEPS + step, num_steps]) + "\n")

    return on_begin


def test_killed_ranks_cost_at_most_one_checkpoint_interval_each(prepared, ranks, tmp_path):
    project = project_of("training.epochs=40", f"training.checkpoints.every_steps={CHECKPOINT_STEPS}")
    wrap = ranks.wrap(STEP_PAUSE_S, on_begin=note_positions(tmp_path))
    rng, killed = random.Random(0), []

    def kill_ranks() -> None:
        before: set[int] = set()
        for _ in range(NUM_KILLS):
            wait_until(lambda: len(pids := ranks.pids()) == 2 and not before & set(pids.values()))  # noqa: B023
            before = set(ranks.pids().values())
            num_steps = ranks.num_steps()
            if rng.random() < 0.8:  # else the kill may hit ranks that are still connecting
                wait_until(lambda: ranks.num_steps() > num_steps)  # noqa: B023
            time.sleep(rng.uniform(0, 2))
            rank = rng.randrange(2)
            os.kill(ranks.pids()[rank], signal.SIGKILL)
            killed.append(rank)

    started = time.monotonic()
    with in_background(kill_ranks):
        history = train(project, prepared, wrap=wrap).history
    seconds = time.monotonic() - started
    assert len(killed) == NUM_KILLS

    positions = [json.loads(line) for line in (tmp_path / "positions").read_text().splitlines()]
    lost = []
    for (step, made), (next_step, next_made) in itertools.pairwise(positions):
        lost.append(step + next_made - made - next_step)
    assert ranks.num_steps() == 40 * STEPS + sum(lost)
    print(f"\n{NUM_KILLS} kills in {seconds:.0f} s; repeated steps: {lost}, mean {mean(lost):.1f}")
    # 2 more, because the last checkpoint may be unfinished, and one rank may be one step ahead.
    assert max(lost) <= CHECKPOINT_STEPS + 2

    check_same(history, train(project, prepared).history)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_killed_within_a_minute(prepared, ranks, rank):
    """The project has the default timeout."""
    project = project_of("training.epochs=6")
    measured = {}

    def stop_rank() -> None:
        wait_until(lambda: len(ranks.pids()) == 2 and ranks.num_steps() > 3 * STEPS)
        stopped = ranks.pids()
        os.kill(stopped[rank], signal.SIGSTOP)
        started = time.monotonic()
        wait_until(lambda: not psutil.pid_exists(stopped[1 - rank]))
        measured["detected"] = time.monotonic() - started
        wait_until(lambda: not set(stopped.values()) & set(ranks.pids().values()))
        measured["restarted"] = time.monotonic() - started
        with contextlib.suppress(psutil.NoSuchProcess):
            measured["status"] = psutil.Process(stopped[rank]).status()

    with in_background(stop_rank):
        history = train(project, prepared, wrap=ranks.wrap(STEP_PAUSE_S)).history
    print(f"\nrank {rank} stopped: {measured}")
    assert measured["detected"] < 60
    assert measured.get("status") in (None, psutil.STATUS_ZOMBIE), "the stopped process must be gone"
    check_same(history, train(project, prepared).history)


COMMAND = (
    "data.source.limit=20000", "training.batch_size=8", "training.epochs=40",
    "training.checkpoints.every_steps=50",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(NUM_ROUNDS))
def test_a_killed_command_resumes_when_it_runs_again(home, ray_cluster, seed):
    """Kills hit it while it prepares, trains, evaluates or registers. In the end, one model exists."""
    from app.data.prepare import prepare
    from app.registry import connection, versions
    from app.training import trainer

    name, rng = f"killed-{seed}", random.Random(seed)
    settings = [*COMMAND, f"name={name}", f"seed={seed}"]
    command = [sys.executable, "-m", "app", "train", "configs/smoke.yaml"]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "RAYLWAY_HOME": str(home)}
    last_lines, moments, num_killed, done = [], [], 0, False
    while not done:
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            if len(moments) < NUM_STARTS:
                moment = rng.uniform(1, 30)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(moment)
                process.kill()
                moments.append(moment)
            output = process.stdout.read()
            last_lines.append(output.strip().splitlines()[-1:])
            assert process.wait(300) in (0, -signal.SIGKILL), output
            num_killed += process.returncode != 0
            done = process.returncode == 0 and len(moments) == NUM_STARTS
            assert "failed" not in output
    print(f"\n{num_killed} killed, after {[round(m, 1) for m in moments]} s; the last line of each run:")
    print("\n".join(str(line)[:120] for line in last_lines))

    version, *others = versions.versions(name)
    assert not others
    assert str(version.version) == "1"
    project = projectfile.load("configs/smoke.yaml", settings)
    prepared = prepare(project)
    trained = trainer.train(project, prepared, lambda _: None)
    assert trained.cached
    client = connection.client()
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")]
    assert sorted(steps) == list(range(40))
    history = trained.history
    check_same(history, train(project, prepared).history)
    assert not list((home / "runs").iterdir())
    assert re.fullmatch(r"\w{20}", trained.key)
