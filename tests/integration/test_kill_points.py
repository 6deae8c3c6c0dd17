"""Kill commands on the cluster before each of their writes in turn, and run them again.

The writes are every rename and creation of a file, and a sample of the SQL commits, of which MLflow and
Optuna make many. tests/unit/state/test_kill_points.py tries all writes of `register`, `promote` and `sign`.
"""

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest

from app.bundle.bundle import Bundle
from app.bundle.manifest import require_passed, verify
from app.cluster.ports import free_ports
from app.registry import connection, sweep_runs, versions
from app.state.audit import Audit
from app.tuning import study as studies
from tests import killer
from tests.integration import consistency
from tests.integration.conftest import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]
SMOKE = "configs/smoke.yaml"
NUM_COMMITS = 8
"""Number of commits of one command before which it is killed, spread evenly."""


@pytest.fixture
def writes(reach, home, tmp_path):
    """Run a command that is killed before its write `number` (from 1), or never if `number` is 0.

    Returns its writes; the last one is the write before which it was killed. Returns None if the command
    ended before that write.
    """

    def run(number: int, *command: str) -> list[tuple[str, str]] | None:
        log = tmp_path / f"writes-{number}"
        log.unlink(missing_ok=True)
        arguments = [str(number), str(log), f"{home}:{tmp_path}:{reach.cluster.directory}", *command]
        done = subprocess.run(
            [sys.executable, "-m", "tests.killer", *arguments],
            cwd=ROOT,
            env={**os.environ, "RAYLWAY_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
        return None if number and done.returncode == 0 else killer.writes(log)

    return run


@pytest.fixture
def killed(writes):
    """Kill `command(number)` before each of its writes in turn, or before those with the numbers `at`; yields
    the number and the write.

    Stops at the first run that ends by itself, because the number of writes varies a little between runs.
    """

    def kill_at_each_write(
        command: Callable[[int], Sequence[str]], at: Sequence[int] = ()
    ) -> Iterator[tuple[int, str]]:
        num_killed = 0
        for number in at or itertools.count(1):
            writes_of_command = writes(number, *command(number))
            if writes_of_command is None:
                break
            num_killed += 1
            yield number, " ".join(writes_of_command[-1])
        assert num_killed > max(2, 0.75 * len(at))

    return kill_at_each_write


def kill_points(writes: list[tuple[str, str]]) -> list[int]:
    """The numbers of the writes before which the command is killed: all but most commits."""
    commits = [number for number, (event, _) in enumerate(writes, 1) if event == "commit"]
    step = max(1, len(commits) // NUM_COMMITS)
    others = [number for number, (event, _) in enumerate(writes, 1) if event != "commit"]
    return sorted({*others, *commits[::step], *commits[-2:]})


def check_registered(name: str, count: int) -> None:
    """Each version is registered once, verifies and is in the audit log; one is the champion."""
    registered_versions = [versions.resolve(name, str(entry.version)) for entry in versions.versions(name)]
    assert len(registered_versions) == len({version.identity for version in registered_versions}) == count
    for version in registered_versions:
        Bundle(version.path).check_example()
        require_passed(verify(version.path), name)
    assert (
        Counter(alias for version in registered_versions for alias in version.aliases)[versions.CHAMPION] == 1
    )
    with Audit() as audit:
        registered = [entry.details["version"] for entry in audit.entries(name, "register")]
    assert sorted(registered) == sorted(version.number for version in registered_versions)


def test_a_killed_train_completes_when_it_is_run_again(writes, killed, raylway):
    """The trained network is reused, so that each run makes only the writes after the training."""

    def command(name: str) -> tuple[str, ...]:
        return ("train", SMOKE, "--set", f"name={name}")

    assert raylway(*command("whole")).returncode == 0
    at = kill_points(writes(0, *command("listed")))
    for number, write in killed(lambda number: command(f"killed-{number}"), at):
        again = raylway(*command(f"killed-{number}"))
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        check_registered(f"killed-{number}", 1)
        client = connection.client()
        experiment = client.get_experiment_by_name(f"killed-{number}")
        assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"FINISHED"}


def test_a_killed_compress_completes_when_it_is_run_again(writes, killed, raylway):
    @functools.cache
    def trained(name: str) -> str:
        settings = ("--set", f"name={name}", "--set", "compression.max_loss=1")
        done = raylway("train", SMOKE, *settings)
        assert done.returncode == 0, done.stdout
        return str(versions.resolve(name, versions.CHAMPION).path)

    def command(name: str) -> tuple[str, ...]:
        return ("compress", trained(name), "--register")

    at = kill_points(writes(0, *command("small")))
    check_registered("small", 2)
    for number, write in killed(lambda number: command(f"small-{number}"), at):
        again = raylway(*command(f"small-{number}"))
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        check_registered(f"small-{number}", 2)


def test_a_killed_predict_leaves_no_output_and_completes_when_it_is_run_again(killed, raylway, tmp_path):
    raylway("train", SMOKE)
    rows = pd.read_parquet(versions.resolve("smoke", versions.CHAMPION).path / "reference.parquet").head(3000)
    rows.to_parquet(tmp_path / "rows.parquet")

    def command(name: str) -> tuple[str, ...]:
        return (
            "predict",
            "smoke",
            "--input",
            f"{tmp_path}/rows.parquet",
            "--output",
            f"{tmp_path}/out/{name}",
        )

    for number, write in killed(lambda number: command(str(number))):
        assert not (tmp_path / "out" / str(number)).exists()
        again = raylway(*command(str(number)))
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        assert f"{len(rows):,} rows predicted" in again.stdout
        assert len(pd.read_parquet(tmp_path / "out" / str(number))) == len(rows)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")], (
        "no draft is left"
    )


def test_a_killed_sweep_completes_when_it_is_run_again(writes, killed, raylway, home):
    def command(name: str) -> tuple[str, ...]:
        return ("sweep", SMOKE, "--trials", "2", "--set", f"sweep.study={name}")

    assert raylway(*command("first")).returncode == 0  # creates the tables
    at = kill_points(writes(0, *command("swept")))
    for number, write in killed(lambda number: command(f"swept-{number}"), at):
        name = f"swept-{number}"
        again = raylway(*command(name), timeout=600)
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        trials = studies.load(name).trials
        assert [(trial.number, trial.state.is_finished()) for trial in trials] == [(0, True), (1, True)]
        assert {"best.yaml", "report.html"} <= {file.name for file in (home / "sweeps" / name).iterdir()}
        client = connection.client()
        smoke = [client.get_experiment_by_name("smoke").experiment_id]
        assert len(client.search_runs(smoke, f"tags.`{sweep_runs.STUDY_TAG}` = '{name}'")) == 1


def test_tokens_verify_after_a_killed_token_command(killed, raylway, home):
    """Each new token verifies with the published keys."""
    from joserfc import jwt
    from joserfc.jwk import KeySet

    folder: Path = home / "issuer"
    for _ in killed(lambda number: ("token", "somebody", "--new-key")):
        for options in ((), ("--new-key",)):
            token = re.findall(r"^ey\S+", raylway("token", "somebody", *options).stdout, re.MULTILINE)
            jwt.decode(
                token[0], KeySet.import_key_set(pd.read_json(folder / "jwks.json", typ="series").to_dict())
            )


@pytest.fixture(scope="module")
def project(ray_cluster, home):
    """Arguments of a project with a champion and a challenger. Its endpoint is undeployed at the end."""
    from app.serving.control.undeploy import undeploy_all

    settings = [
        "name=served", f"serving.port={free_ports(1)[0]}", "serving.num_cpus=0.1",
        "training.epochs=1", "training.num_workers=1", "gate={beat: [], tolerance: 1}",
    ]  # fmt: skip
    arguments = [SMOKE, *(part for setting in settings for part in ("--set", setting))]
    for seed in (0, 1):
        trained = [sys.executable, "-m", "app", "train", *arguments, "--set", f"seed={seed}"]
        subprocess.run(trained, cwd=ROOT, check=True, capture_output=True)
    yield arguments
    undeploy_all()


def test_a_killed_first_serve_completes_when_it_is_run_again(killed, raylway, project):
    def command(number: int) -> list[str]:
        raylway("undeploy", "served")
        return ["serve", *project]

    for number, write in killed(command):
        again = raylway("serve", *project)
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        assert consistency.check_endpoint("served"), (number, write)


def test_a_killed_update_by_serve_completes_when_it_is_run_again(killed, raylway, project):
    """Each update changes limits, which restarts replicas, and moves a variant to its own workers or back."""
    assert raylway("serve", *project).returncode == 0

    def command(number: int) -> list[str]:
        workers = "serving.variants.champion.workers=" + ("{num_cpus: 0.1}" if number % 2 else "null")
        return ["serve", *project, "--set", f"serving.limits.max_rows={100 + number}", "--set", workers]

    for number, write in killed(command):
        again = raylway(*command(number))
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        assert consistency.check_endpoint("served").serving.limits.max_rows == 100 + number, write


def test_a_killed_traffic_completes_when_it_is_run_again(killed, raylway, project):
    assert raylway("serve", *project).returncode == 0

    def command(number: int) -> tuple[str, ...]:
        return ("traffic", "served", "--champion", str(number))

    for number, write in killed(command):
        again = raylway(*command(number))
        assert again.returncode == 0, f"{write}: {again.stdout}{again.stderr}"
        assert consistency.check_endpoint("served").traffic.variants["champion"].weight == number, write


def test_a_killed_undeploy_completes_when_it_is_run_again(killed, raylway, project):
    def command(number: int) -> tuple[str, ...]:
        assert raylway("serve", *project).returncode == 0
        return ("undeploy", "served")

    for _, write in killed(command):
        again = raylway("undeploy", "served")
        assert again.returncode in (0, 2), f"{write}: {again.stdout}{again.stderr}"
        assert consistency.check_endpoint("served") is None
