"""What is lost when processes are killed or stopped at random moments, many times."""

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
"""Number of times that a rank is killed in one training."""
NUM_STARTS, NUM_ROUNDS = 10, 5
"""Number of times that the command is killed in one training, and of such trainings."""

EVERY = 20
STEPS = 65
SLOW_S = 0.02
"""A step takes a good millisecond; this leaves room to hit one."""


def slow(*overrides: str):
    settings = ("data.source.limit=3000", "training.batch_size=16", f"training.max_failures={2 * NUM_KILLS}")
    return projectfile.load("configs/smoke.yaml", [*settings, *overrides])


@pytest.fixture(scope="module")
def prepared(ray_cluster):
    from app.data.prepare import prepare

    return prepare(slow())


def wait_until(true, timeout_s: float = 400.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(what):
    """Run a function in a thread during the block; its exception is raised at the end."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(what)
        yield
        future.result()


def note_positions(folder):
    """An `on_begin` with which rank 0 notes where its group resumes, and how many steps were made before."""

    def on_begin(rank, epoch, step):
        import json

        if rank == 0:
            made = max(file.stat().st_size for file in folder.glob("steps-*"))
            with (folder / "positions").open("a") as file:
                file.write(json.dumps([epoch * STEPS + step, made]) + "\n")

    return on_begin


def test_killed_ranks_cost_at_most_one_checkpoint_interval_each(prepared, ranks, tmp_path):
    project = slow("training.epochs=40", f"training.checkpoints.every_steps={EVERY}")
    wrap = ranks.wrap(SLOW_S, on_begin=note_positions(tmp_path))
    dice, killed = random.Random(0), []

    def kill_ranks() -> None:
        before: set[int] = set()
        for _ in range(NUM_KILLS):
            wait_until(lambda: len(pids := ranks.pids()) == 2 and not before & set(pids.values()))  # noqa: B023
            before = set(ranks.pids().values())
            made = ranks.num_steps()
            if dice.random() < 0.8:  # else it may be while the ranks find each other
                wait_until(lambda: ranks.num_steps() > made)  # noqa: B023
            time.sleep(dice.uniform(0, 2))
            rank = dice.randrange(2)
            os.kill(ranks.pids()[rank], signal.SIGKILL)
            killed.append(rank)

    began = time.monotonic()
    with meanwhile(kill_ranks):
        history = train(project, prepared, wrap=wrap).history
    seconds = time.monotonic() - began
    assert len(killed) == NUM_KILLS

    positions = [json.loads(line) for line in (tmp_path / "positions").read_text().splitlines()]
    lost = []
    for (place, made), (next_place, next_made) in itertools.pairwise(positions):
        lost.append(place + next_made - made - next_place)
    assert ranks.num_steps() == 40 * STEPS + sum(lost)
    print(f"\n{NUM_KILLS} kills in {seconds:.0f} s; steps made again: {lost}, mean {mean(lost):.1f}")
    # The last checkpoint may have been in the making, and one rank is up to a step ahead of the other.
    assert max(lost) <= EVERY + 2

    check_same(history, train(project, prepared).history)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_killed_within_a_minute(prepared, ranks, rank):
    """With the default timeout."""
    project = slow("training.epochs=6")
    measured = {}

    def stop_rank() -> None:
        wait_until(lambda: len(ranks.pids()) == 2 and ranks.num_steps() > 3 * STEPS)
        stopped = ranks.pids()
        os.kill(stopped[rank], signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda: not psutil.pid_exists(stopped[1 - rank]))
        measured["found"] = time.monotonic() - began
        wait_until(lambda: not set(stopped.values()) & set(ranks.pids().values()))
        measured["again"] = time.monotonic() - began
        with contextlib.suppress(psutil.NoSuchProcess):
            measured["left"] = psutil.Process(stopped[rank]).status()

    with meanwhile(stop_rank):
        history = train(project, prepared, wrap=ranks.wrap(SLOW_S)).history
    print(f"\nrank {rank} stopped: {measured}")
    assert measured["found"] < 60
    assert measured.get("left") in (None, psutil.STATUS_ZOMBIE), "the stopped process must be gone"
    check_same(history, train(project, prepared).history)


COMMAND = (
    "data.source.limit=20000", "training.batch_size=8", "training.epochs=40",
    "training.checkpoints.every_steps=50",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(NUM_ROUNDS))
def test_a_killed_command_resumes_when_it_runs_again(home, ray_cluster, seed):
    """It is killed while it prepares, trains, evaluates or registers. In the end there is one model."""
    from app.data.prepare import prepare
    from app.registry import connection, versions
    from app.training import trainer

    name, dice = f"killed-{seed}", random.Random(seed)
    settings = [*COMMAND, f"name={name}", f"seed={seed}"]
    command = [sys.executable, "-m", "app", "train", "configs/smoke.yaml"]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "RAYLWAY_HOME": str(home)}
    said, moments, num_killed, done = [], [], 0, False
    while not done:
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            if len(moments) < NUM_STARTS:
                moment = dice.uniform(1, 30)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(moment)
                process.kill()
                moments.append(moment)
            output = process.stdout.read()
            said.append(output.strip().splitlines()[-1:])
            assert process.wait(300) in (0, -signal.SIGKILL), output
            num_killed += process.returncode != 0
            done = process.returncode == 0 and len(moments) == NUM_STARTS
            assert "failed" not in output
    print(f"\n{num_killed} killed, after {[round(m, 1) for m in moments]} s; the last line each time:")
    print("\n".join(str(line)[:120] for line in said))

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
