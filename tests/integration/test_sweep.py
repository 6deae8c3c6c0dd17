"""Sweeps: real trainings on Ray Tune, the stored study, and interruptions."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from app.config import Project, projectfile
from app.errors import UserError
from app.registry import connection
from app.tuning import study as studies
from app.tuning import tuner
from app.tuning.progress import Progress
from app.tuning.space import Space
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration

SMOKE = "configs/smoke.yaml"
RATE = {"training.learning_rate": {"type": "float", "low": 0.002, "high": 0.1, "log": True}}
SMALL = {"training.num_workers": 1, "training.epochs": 2, "training.batch_size": 128}
NO_SCHEDULER = {"kind": "none"}
# A name of its own and a tolerant gate let its candidates pass, whatever other tests registered.
SHOWN = (SMOKE, "--set", "name=shown", "--set", "gate.tolerance=1")


def project(study: str, space: dict = RATE, **sweep) -> Project:
    """The smoke project with a sweep of its own."""
    document = projectfile.load(SMOKE).model_dump(mode="json", exclude_unset=True)
    sweep = {"study": study, "set": SMALL, "trials": 3, **sweep, "space": space}
    return Project.model_validate({**document, "sweep": sweep})


def run(project: Project, **listeners) -> Progress:
    return tuner.run(project, listeners.get("watch", lambda _: None), print)


def states(progress: Progress) -> list[str]:
    return [trial.state.name for trial in progress.trials]


# Through the command


@pytest.fixture(scope="module")
def swept(raylway):
    """`raylway sweep` of four trials, once for the tests that read its results."""
    done = raylway("sweep", *SHOWN, "--trials", "4", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def experiment(client: MlflowClient) -> list[str]:
    return [client.get_experiment_by_name("shown").experiment_id]


def test_the_command_prints_each_trial_the_best_and_the_path_of_the_report(swept):
    for number in range(4):
        assert f"trial {number} (" in swept
    assert "4 of 4 trials" in swept
    assert "best.yaml" in swept
    assert "report.html" in swept


def test_the_best_project_is_a_file_that_trains_to_the_same_result(swept, home, raylway):
    study = studies.load("shown")
    file = home / "sweeps" / "shown" / "best.yaml"
    assert projectfile.load(file).training.learning_rate == study.best_params["training.learning_rate"]
    again = raylway("train", str(file), "--fresh")
    assert again.returncode == 0, again.stdout + again.stderr
    client = MlflowClient(connection.uri())
    (run,) = client.search_runs(experiment(client), "tags.`raylway.key` != ''")
    curve = client.get_metric_history(run.info.run_id, "validation_auc")
    assert max(metric.value for metric in curve) == study.best_value


def test_each_trial_is_a_child_run_of_the_study_with_parameters_and_curves(swept, home):
    client = MlflowClient(connection.uri())
    (parent,) = client.search_runs(experiment(client), "tags.`raylway.study` = 'shown'")
    assert parent.info.status == "FINISHED"
    children = client.search_runs(experiment(client), f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    stored = {str(trial.number): trial for trial in studies.load("shown").trials}
    assert {child.data.tags["raylway.trial"] for child in children} == set(stored)
    for child in children:
        trial = stored[child.data.tags["raylway.trial"]]
        assert float(child.data.params["training.learning_rate"]) == trial.params["training.learning_rate"]
        assert child.info.status == {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}[trial.state.name]
        if trial.state == TrialState.COMPLETE:
            curve = client.get_metric_history(child.info.run_id, "train_loss")
            assert [metric.step for metric in curve] == [0, 1, 2]
            assert child.data.metrics["auc"] == trial.value


def test_the_report_is_one_page_that_needs_no_network(swept, home):
    page = (home / "sweeps" / "shown" / "report.html").read_text()
    for title in ("History", "Curves", "Cost", "Trials"):
        assert f"<h2>{title}</h2>" in page
    body = page[page.index("</script>") :]
    assert "src=" not in body
    assert "http" not in body.replace("http://www.w3.org", "")


def test_more_trials_extend_a_finished_sweep(swept, raylway):
    study = studies.load("shown")
    before = {trial.number: (trial.state, trial.values, trial.params) for trial in study.trials}
    done = raylway("sweep", *SHOWN, "--trials", "5", "--train-best")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 trials" in done.stdout
    assert "trial 0 (" not in done.stdout, "finished trials do not run again"
    assert "shown version" in done.stdout, "the best project was trained and registered"
    after = {
        trial.number: (trial.state, trial.values, trial.params) for trial in studies.load("shown").trials
    }
    assert len(after) == 5
    assert before.items() <= after.items()


def test_a_study_of_another_space_or_project_is_refused(swept, raylway):
    for change in (
        "sweep.space={training.weight_decay: {type: float, low: 0, high: 1}}",
        "training.epochs=2",
    ):
        done = raylway("sweep", *SHOWN, "--set", change)
        assert done.returncode == 2
        assert "was started with other settings" in done.stderr
        assert change.partition("=")[0].split(".")[1] in done.stderr
        assert "sweep.study=" in done.stderr, "the message names the key to change"


def test_optuna_dashboard_shows_the_study(swept):
    import json
    import urllib.request

    from app.cluster.ports import free_ports

    port = free_ports(1)[0]
    command = [Path(sys.executable).with_name("optuna-dashboard"), studies.url(), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as dashboard:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5)
                    break
                time.sleep(0.2)
            names = {study["study_name"] for study in json.load(answer)["study_summaries"]}
        finally:
            dashboard.terminate()
    assert "shown" in names


# Kinds of trials and searches


def test_trials_can_have_several_horovod_workers(ray_cluster):
    progress = run(
        project("pairs", set={**SMALL, "training.num_workers": 2}, trials=1, scheduler=NO_SCHEDULER)
    )
    assert states(progress) == ["COMPLETE"]
    assert len(progress.trials[0].user_attrs["history"][0]) == 2


def test_four_trials_of_half_a_cpu_train_at_once_on_two_cpus(ray_cluster):
    max_running = 0

    def watch(progress: Progress) -> None:
        nonlocal max_running
        max_running = max(max_running, len(progress.running))

    halves = {**SMALL, "training.num_cpus": 0.5, "training.epochs": 300}
    assert len(run(project("halves", set=halves, trials=4), watch=watch).trials) == 4
    assert max_running == 4


def test_features_can_be_swept_and_each_preparation_runs_once(ray_cluster, home):
    before = set((home / "stages" / "prepare").glob("[!.]*"))
    encoding = {"features.age.encode": {"type": "choice", "values": ["min_max", "quantile"]}}
    progress = run(
        project("encodings", {**RATE, **encoding}, search="random", trials=4, scheduler=NO_SCHEDULER)
    )
    assert states(progress) == ["COMPLETE"] * 4
    used = {trial.params["features.age.encode"] for trial in progress.trials}
    assert len(set((home / "stages" / "prepare").glob("[!.]*")) - before) <= len(used)


def test_the_value_of_folds_is_their_mean(ray_cluster):
    (trial,) = run(project("folds", folds=2, trials=1, scheduler=NO_SCHEDULER)).trials
    folds = [max(m["validation_auc"] for m in history) for history in trial.user_attrs["history"]]
    assert len(folds) == 2
    assert folds[0] != folds[1]
    assert trial.value == pytest.approx(sum(folds) / 2)


def test_several_objectives_give_a_pareto_front(ray_cluster):
    hidden = {"model.hidden": {"type": "choice", "values": [[4], [64, 64]]}}
    points = [{"model.hidden": value} for value in hidden["model.hidden"]["values"]]
    overrides = {"objectives": ["auc", "size_mb", "latency_ms"], "search": "nsga2", "trials": 3}
    progress = run(project("front", {**RATE, **hidden}, points=points, **overrides))
    assert states(progress) == ["COMPLETE"] * 3
    sizes = {trial.params["model.hidden"]: trial.values[1] for trial in progress.trials}
    assert sizes["[4]"] < sizes["[64, 64]"]
    best = {trial.number for trial in progress.best()}
    assert best == {trial.number for trial in studies.load("front").best_trials}


def test_a_grid_tries_every_allowed_point_once(ray_cluster):
    grid = {
        "model.hidden": {"type": "choice", "values": [[4], [8]]},
        "training.batch_size": {"type": "int", "low": 64, "high": 192, "step": 64},
    }
    constraint = "training.batch_size < 192 or len(model.hidden) > 1"
    swept = project("grid", grid, search="grid", trials=50, constraints=[constraint], scheduler=NO_SCHEDULER)
    progress = run(swept)
    points = [tuple(trial.params.values()) for trial in progress.trials]
    assert sorted(points) == [("[4]", 64), ("[4]", 128), ("[8]", 64), ("[8]", 128)]


@pytest.mark.parametrize("search", ["gp", "cmaes", "random"])
def test_other_searches_complete_all_trials(ray_cluster, search):
    space = {**RATE, "training.weight_decay": {"type": "float", "low": 0.0, "high": 0.1}}
    progress = run(project(search, space, search=search, startup_trials=2, trials=3, scheduler=NO_SCHEDULER))
    assert states(progress) == ["COMPLETE"] * 3
    assert len({trial.params["training.learning_rate"] for trial in progress.trials}) == 3


def test_successive_halving_stores_stopped_trials_as_pruned(ray_cluster):
    rates = {"training.learning_rate": {"type": "choice", "values": [0.05, 0.04, 1e-9, 1e-8]}}
    points = [{"training.learning_rate": rate} for rate in rates["training.learning_rate"]["values"]]
    swept = project(
        "halving", rates, points=points, trials=4, concurrent=1, set={**SMALL, "training.epochs": 4}
    )
    progress = run(swept)
    assert states(progress)[0] == "COMPLETE"
    assert states(progress)[2:] == ["PRUNED", "PRUNED"]
    for trial in studies.load("halving").trials[2:]:
        assert trial.state == TrialState.PRUNED
        assert trial.last_step == 1, "after the first epoch"
        assert not Path(os.environ["RAYLWAY_HOME"], "runs", trial.user_attrs["run"]).exists()


@pytest.mark.parametrize("scheduler", ["median", "hyperband"])
def test_other_schedulers_complete_or_prune_all_trials(ray_cluster, scheduler):
    progress = run(project(scheduler, scheduler={"kind": scheduler}, trials=4))
    assert set(states(progress)) <= {"COMPLETE", "PRUNED"}
    assert len(progress.trials) == 4


def test_population_based_training_replaces_the_networks_of_bad_trials(ray_cluster):
    rates = {"training.learning_rate": {"type": "float", "low": 1e-6, "high": 0.1, "log": True}}
    points = [{"training.learning_rate": rate} for rate in (0.05, 0.03, 1e-6, 2e-6)]
    settings = {**SMALL, "training.epochs": 6, "training.schedule": "constant"}
    progress = run(
        project("population", rates, points=points, trials=4, set=settings, scheduler={"kind": "pbt"})
    )
    assert states(progress) == ["COMPLETE"] * 4
    replaced = [t for t in progress.trials if t.user_attrs["point"] != t.params]
    assert replaced, "at least one of two bad trials must get the network of a better one"
    values = sorted(trial.value for trial in progress.trials)
    assert values[1] > 0.7, values


def test_a_warm_start_reads_an_earlier_study_and_given_points_come_first(ray_cluster):
    run(project("earlier", trials=2, scheduler=NO_SCHEDULER))
    point = {"training.learning_rate": 0.0123}
    progress = run(project("later", warm_start=["earlier"], points=[point], trials=2, startup_trials=2))
    assert progress.trials[0].params == point or progress.trials[1].params == point
    assert len(studies.load("later").trials) == 2, "trials of the earlier study are not copied"
    with pytest.raises(UserError, match="no trial of the study 'earlier'"):
        run(
            project(
                "never", {"training.weight_decay": RATE["training.learning_rate"]}, warm_start=["earlier"]
            )
        )


# Failures and limits


def test_a_trial_that_diverges_is_stored_as_failed_and_the_sweep_continues(ray_cluster):
    rates = {"training.learning_rate": {"type": "choice", "values": [0.01, 1e30]}}
    points = [{"training.learning_rate": rate} for rate in (1e30, 0.01)]
    progress = run(project("diverging", rates, points=points, trials=3))
    failed = [trial for trial in progress.trials if trial.params["training.learning_rate"] == 1e30]
    assert failed
    assert all(trial.state == TrialState.FAIL for trial in failed)
    assert "diverged" in failed[0].user_attrs["error"]
    assert len(progress.trials) == 3
    assert progress.best()[0].params["training.learning_rate"] == 0.01


def test_a_killed_trial_runs_again_and_is_stored_as_failed_after_the_second_kill(ray_cluster):
    slow = {**SMALL, "training.epochs": 200}
    killed: list[int] = []

    def watch(progress: Progress) -> None:
        running = progress.running.get(0)
        if running and (running.epochs or killed) and len(killed) < 2:
            for process in psutil.process_iter(["cmdline", "environ"]):
                is_ours = (process.info["environ"] or {}).get("RAYLWAY_HOME") == os.environ["RAYLWAY_HOME"]
                is_trial = "Trial" in "".join(process.info["cmdline"] or [])
                if is_ours and is_trial and process.pid not in killed:
                    process.kill()
                    killed.append(process.pid)

    point = {"training.learning_rate": 0.01}
    swept = project("killed", points=[point], trials=2, concurrent=1, set=slow, scheduler=NO_SCHEDULER)
    progress = run(swept, watch=watch)
    assert len(killed) >= 2
    assert [trial.state.name for trial in sorted(progress.trials, key=lambda t: t.number)] == [
        "FAIL",
        "COMPLETE",
    ]


def test_the_target_ends_a_sweep(ray_cluster):
    progress = run(project("target", target=0.5, trials=20, concurrent=1))
    assert len(progress.trials) == 1
    assert "sweep.target" in progress.end_reason


def test_core_hours_and_wall_time_end_a_sweep_that_can_be_resumed(ray_cluster):
    progress = run(project("budget", max_core_hours=1e-6, trials=5, concurrent=1))
    assert len(progress.trials) == 1
    assert "max_core_hours" in progress.end_reason
    progress = run(project("budget", max_hours=1e-7, trials=5))
    assert len(progress.trials) == 1
    assert "max_hours" in progress.end_reason
    assert len(run(project("budget", trials=3)).trials) == 3


def test_two_sweeps_of_one_study_cannot_run_at_once(ray_cluster, raylway):
    swept = project("locked")
    with studies.opened("locked", ["maximize"], tuner.shared_settings(Space(swept)), print):
        with pytest.raises(UserError, match="is being swept by process"):
            run(swept)
        done = raylway("sweep", SMOKE, "--set", "sweep.study=locked")
        assert done.returncode == 2
        assert "is being swept by" in done.stderr
    assert len(run(swept).trials) == 3


# Killed and stopped sweeps


@pytest.fixture
def sweeping(started):
    """Start `raylway sweep` with overrides, for a `with` block that follows its output."""

    def start(*overrides: str):
        sets = (argument for override in overrides for argument in ("--set", override))
        return started("sweep", SMOKE, *sets)

    return start


def finished(study: optuna.Study) -> list[int]:
    return [trial.number for trial in study.trials if trial.state.is_finished()]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_a_stopped_sweep_resumes_with_the_same_trials(sweeping, number):
    name = f"stopped-{number.name.lower()}"
    overrides = [f"sweep.study={name}", "sweep.trials=3", "training.epochs=30"]
    with sweeping(*overrides) as process:
        for line in process.stdout:
            if "trial " in line and "(1/3)" in line:
                break
        process.send_signal(number)
        rest = process.stdout.read()
        code = process.wait(60)
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert "run the command again to continue" in rest
    before = {t.number: (t.state, t.values) for t in studies.load(name).trials if t.state.is_finished()}
    assert 1 <= len(before) < 3
    with sweeping(*overrides) as process:
        output = process.stdout.read()
        assert process.wait(10) == 0, output
    study = studies.load(name)
    assert len(study.trials) == 3
    assert finished(study) == list(range(3))
    assert before.items() <= {t.number: (t.state, t.values) for t in study.trials}.items()


def test_a_ray_job_sweeps_and_a_stopped_one_resumes(home, reach):
    from ray.job_submission import JobSubmissionClient

    address = reach.cluster.dashboard_url
    token = Path(reach.cluster.token_path).read_text()
    client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
    command = (
        f"python -m app sweep {SMOKE} --set sweep.study=job --set sweep.trials=4 --set training.epochs=30"
    )
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), "excludes": [".venv"]})
    deadline = time.monotonic() + 120
    while "(1/4)" not in client.get_job_logs(job):
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    client.stop_job(job)
    while client.get_job_status(job).value == "RUNNING":
        time.sleep(0.5)
    assert "run the command again to continue" in client.get_job_logs(job)
    assert 1 <= len(finished(studies.load("job"))) < 4
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), "excludes": [".venv"]})
    while client.get_job_status(job).value in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline + 120
        time.sleep(0.5)
    assert client.get_job_status(job).value == "SUCCEEDED", client.get_job_logs(job)
    assert finished(studies.load("job")) == list(range(4))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_killed_three_times_at_random_finishes_every_trial_once(sweeping):
    """SIGKILL hits the driver at random times. In the end, forty trials are stored, each finished once."""
    import random

    rng = random.Random(4)
    overrides = ["sweep.study=forty", "sweep.trials=40", "training.epochs=25"]
    ends: dict[int, tuple] = {}
    for kill in range(4):
        with sweeping(*overrides) as process:
            if kill < 3:
                for line in process.stdout:
                    if "trial " in line:
                        break
                time.sleep(rng.uniform(0.0, 6.0))
                process.kill()
                process.wait()
            else:
                output = process.stdout.read()
                assert process.wait(10) == 0, output
        now = {t.number: (t.state, t.values, t.datetime_complete) for t in studies.load("forty").trials
               if t.state.is_finished()}  # fmt: skip
        print(
            f"after {kill + 1} runs: {len(now)} finished, "
            f"{studies.load('forty').trials[-1].number + 1} started"
        )
        assert ends.items() <= now.items(), "a finished trial does not run again"
        ends = now
    study = studies.load("forty")
    assert finished(study) == list(range(40))
    assert len(study.trials) == 40
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 40, "no point is tried twice"
    client = MlflowClient(connection.uri())
    names = [client.get_experiment_by_name("smoke").experiment_id]
    runs = client.search_runs(names, "tags.`raylway.study` = 'forty'")
    query = f"tags.`mlflow.parentRunId` = '{runs[0].info.run_id}'"
    children = client.search_runs(names, query, max_results=1000)
    assert sorted(int(child.data.tags["raylway.trial"]) for child in children) == list(range(40))
