"""Commands on a cluster whose CPUs an endpoint or an actor uses."""

import signal
import sys
import time

import pandas as pd
import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from app.cluster import capacity
from app.cluster.ports import free_ports
from app.config import Serving
from app.serving.control import deploy
from app.serving.control.undeploy import undeploy_all
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from tests.bundles import ROWS, build
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration

NAME = "roomy"
SMALL = ("--set", "data.source.limit=3000", "--set", "training.epochs=1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bundles") / "1", seed=1)


@pytest.fixture(scope="module")
def endpoint(ray_cluster, bundle):
    """An endpoint that uses all CPUs but one. Yields the number of CPUs that it uses."""
    num_cpus = ray.cluster_resources()["CPU"] - 1
    serving = Serving.model_validate(
        {
            "port": free_ports(1)[0],
            "num_cpus": num_cpus,
            "variants": {"champion": {"version": "1", "weight": 1}},
            "autoscaling": {"min_replicas": 1, "max_replicas": 1},
        }
    )
    variants = {"champion": DeployedVariant(version="1", weight=1, path=bundle)}
    deploy.deploy(serving, NAME, Traffic(salt="1", policy="weighted", variants=variants))
    yield num_cpus
    undeploy_all()


@pytest.fixture
def greedy(ray_cluster):
    """An actor that uses all CPUs until the end of the test."""

    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    class Greedy:
        def ready(self):
            pass

    actor = Greedy.remote()
    ray.get(actor.ready.remote())
    yield actor
    ray.kill(actor)


@pytest.fixture
def table(tmp_path):
    pd.DataFrame(ROWS * 1000).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


# The tests with `greedy` come first: it needs all CPUs, and `endpoint` keeps some until the module ends.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_predict_prints_what_it_waits_for_and_one_signal_ends_it(
    greedy, started, bundle, table, tmp_path, number
):
    output = tmp_path / "answers"
    with started("predict", str(bundle), "--input", str(table), "--output", str(output)) as process:
        for line in process.stdout:
            if "waiting for 1 CPUs" in line:
                break
        time.sleep(2)  # Ray Data itself now waits
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert "other commands" in line
    assert not output.exists()


def test_a_job_that_is_stopped_while_it_waits_does_not_succeed(greedy, reach, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", reach.cluster.token_path)
    client = JobSubmissionClient(reach.cluster.dashboard_url)
    job = client.submit_job(
        entrypoint=f"{sys.executable} -m app train configs/smoke.yaml --set name=halted",
        runtime_env={"working_dir": str(ROOT), "excludes": [".venv", ".git", "*.db", ".raylway"]},
    )
    deadline = time.monotonic() + 120
    while "waiting for 1 CPUs" not in client.get_job_logs(job):
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert client.get_job_status(job) in (JobStatus.STOPPED, JobStatus.FAILED)


def test_capacity_names_the_endpoint_that_uses_cpus(endpoint):
    assert capacity.current().endpoints == {NAME: endpoint}


def test_predict_runs_beside_an_endpoint(endpoint, bundle, table, tmp_path, raylway):
    done = raylway("predict", str(bundle), "--input", str(table), "--output", str(tmp_path / "answers"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3,000 rows predicted" in done.stdout


def test_train_claims_less_cpu_beside_an_endpoint(endpoint, raylway):
    done = raylway("train", "configs/smoke.yaml", "--set", "name=beside", *SMALL, timeout=400)
    assert done.returncode in (0, 3), done.stdout + done.stderr  # the gate may reject it
    assert f"endpoint {NAME} {endpoint:g}): each of 2 workers claims 0.5 instead of 1" in done.stdout


@pytest.mark.slow
def test_sweep_runs_beside_an_endpoint(endpoint, raylway):
    done = raylway("sweep", "configs/smoke.yaml", "--trials", "2", "--set", "name=beside", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
