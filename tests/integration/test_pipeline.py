"""Commands from training to promotion and predictions, and the inputs that they refuse."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pandas as pd
import pytest

from app.cluster.ports import free_ports
from app.config import projectfile
from app.errors import UserError
from app.registry import connection
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LINEAR = ("--set", "model={kind: linear}")


@pytest.fixture(scope="module")
def trained(raylway):
    """Output of `raylway train` for both candidates of the smoke project: the linear one, then the MLP."""
    return [raylway("train", "configs/smoke.yaml", *overrides, timeout=300) for overrides in (LINEAR, ())]


def test_the_first_version_is_the_champion_and_the_second_the_challenger(trained):
    first, second = trained
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    assert "smoke version 1 (champion)" in first.stdout
    assert "smoke version 2 (challenger)" in second.stdout
    for stage in ("prepare", "train", "evaluate", "gate", "register"):
        assert re.search(rf"^ +{stage} +[\d.]+ s ", second.stdout, re.MULTILINE)
    assert "(done before)" in next(line for line in second.stdout.splitlines() if "prepare" in line)


def test_a_repeated_command_repeats_no_stage(trained, raylway):
    again = raylway("train", "configs/smoke.yaml")
    assert again.returncode == 0, again.stdout
    assert "epoch" not in again.stdout
    assert "smoke version 2 (challenger)" in again.stdout


def test_the_run_is_in_mlflow_with_its_epochs_and_bundle(trained, ray_cluster):
    from app.bundle.bundle import Bundle
    from app.registry import connection, versions

    version = versions.resolve("smoke", "challenger")
    bundle = Bundle(version.path)
    bundle.check_example()
    assert bundle.manifest["seed"] == 0
    client = connection.client()
    run = client.get_run(client.get_model_version("smoke", "2").run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.kind"] == "mlp"
    assert run.data.metrics["test_auc"] > 0.75
    assert [m.step for m in client.get_metric_history(run.info.run_id, "validation_auc")] == [0, 1, 2]


def test_a_training_that_diverges_names_the_key_to_change(raylway):
    diverged = raylway("train", "configs/smoke.yaml", "--set", "training.learning_rate=1e30")
    assert diverged.returncode == 2, diverged.stdout + diverged.stderr
    assert "the training diverged in epoch 1" in diverged.stderr
    assert "training.learning_rate" in diverged.stderr


def test_a_candidate_that_fails_the_gate_is_not_registered(trained, raylway):
    refused = raylway("train", "configs/smoke.yaml", "--set", "gate.minimum={auc: 0.999}")
    assert refused.returncode == 3
    assert re.search(r"not passed: auc 0\.\d{4} is below the minimum 0\.9990", refused.stdout)
    assert "not registered" in refused.stdout
    assert "version 3" not in raylway("versions", "smoke").stdout


def test_a_killed_command_resumes_its_mlflow_run(raylway, started, ray_cluster):
    """The command gets SIGKILL during training; the same command then completes the run."""
    command = ["train", "configs/smoke.yaml", "--set", "name=killed", "--set", "training.epochs=6"]
    with started(*command) as process:
        for line in process.stdout:
            if "epoch 2/6" in line:
                process.kill()
        assert process.wait(60) == -signal.SIGKILL
    again = raylway(*command)
    assert again.returncode == 0, again.stdout
    assert "resumed" in again.stdout
    assert "epoch 1/6" not in again.stdout
    client = connection.client()
    runs = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    steps = [m.step for m in client.get_metric_history(runs[0].info.run_id, "train_loss")]
    assert sorted(steps) == list(range(6))


def test_serve_keeps_an_endpoint_up_until_it_is_stopped(trained, tmp_path, home):
    """Without a cluster of `up`, `raylway serve` starts its own, and ends it at SIGINT."""
    port = free_ports(1)[0]
    # A state directory with the same registry, but without the record of the shared cluster.
    alone = tmp_path / "home"
    alone.mkdir()
    for name in ("mlflow.db", "artifacts"):
        (alone / name).symlink_to(home / name)
    with subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "configs/smoke.yaml", "--set", f"serving.port={port}"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAYLWAY_HOME": str(alone)},
    ) as process, ExitStack() as stack:  # fmt: skip
        stack.callback(process.kill)  # if the test fails
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        curl = next(line for line in lines if line.startswith("curl"))
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
        assert '"variant"' in answer.stdout
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/v2/health/ready")


def test_promote_moves_the_champion(trained, raylway):
    assert "smoke version 2 is the champion" in raylway("promote", "smoke", "challenger").stdout
    listed = raylway("versions", "smoke").stdout
    assert re.search(r"^ +2 +champion", listed, re.MULTILINE)
    assert "challenger" not in listed
    assert raylway("promote", "smoke", "1").returncode == 0
    missing = raylway("promote", "smoke", "9")
    assert missing.returncode == 2
    assert "no version '9'" in missing.stderr


def test_the_champion_is_evaluated_on_rows_that_it_was_not_trained_on(ray_cluster):
    """Another seed and one more column do not change the split."""
    from app.console import Console
    from app.jobs import pipeline

    def train(*overrides: str) -> pipeline.Outcome:
        small = ["name=judged", "model={kind: linear}", "training.num_workers=1", "training.epochs=1"]
        project = projectfile.load("configs/smoke.yaml", [*small, "gate={tolerance: 1}", *overrides])
        return pipeline.run(project, Console(io.StringIO()))

    first = train()
    assert first.decision.reason.endswith("no champion yet)")
    another = train("seed=1", "data.columns.race={type: category}", "features.race={encode: one_hot}")
    assert another.decision.reason.endswith(f"champion {first.evaluation['model']['auc']:.4f})")


BAD_DATA = {
    "missing file": ("no.parquet", None, "no such file"),
    "empty file": ("empty.parquet", b"", "0 bytes"),
    "no parquet": ("bad.parquet", b"garbage", "must be a parquet file"),
}


def frame() -> pd.DataFrame:
    rows = range(400)
    return pd.DataFrame(
        {
            "age": [20 + i % 50 for i in rows],
            "workclass": ["Private" if i % 3 else "State-gov" for i in rows],
            "educational-num": [1 + i % 16 for i in rows],
            "marital-status": ["Divorced" if i % 2 else "Widowed" for i in rows],
            "gender": ["Male" if i % 2 else "Female" for i in rows],
            "hours-per-week": [20 + i % 40 for i in rows],
            "income": [">50K" if i % 4 == 0 else "<=50K" for i in rows],
        }
    )


BAD_FRAMES = {
    "no label": (lambda f: f.drop(columns="income"), "the label 'income' is missing"),
    "constant label": (lambda f: f.assign(income="<=50K"), "constant"),
    "label never positive": (lambda f: f.assign(income=f.age.astype(str)), "'>50K' must occur"),
    "no rows": (lambda f: f.head(0), "no rows"),
    "column of another type": (lambda f: f.assign(age=f.age.astype(str)), "'age' must hold numbers"),
    "column missing": (lambda f: f.drop(columns="age"), "column 'age' is missing"),
    "NaN not allowed": (lambda f: f.assign(age=f.age.where(f.age > 25)), "age: must not be missing"),
    "value not allowed": (lambda f: f.assign(gender="x"), "gender: must be one of Female, Male"),
    "out of range": (lambda f: f.assign(age=f.age - 500), "age: must be at least 0"),
    "too few rows": (lambda f: f.head(6), "too few"),
}


def source(path):
    return f"data.source={{path: {path}, format: {path.suffix[1:]}}}"


@contextmanager
def no_new_stage(home):
    """Check that the block leaves no new folder of the prepare stage."""
    before = sorted((home / "stages" / "prepare").glob("*"))
    yield
    assert sorted((home / "stages" / "prepare").glob("*")) == before


def check_refused(raylway, home, path, message):
    with no_new_stage(home):
        refused = raylway("train", "configs/smoke.yaml", "--set", source(path))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


@pytest.mark.parametrize("case", BAD_DATA)
def test_an_unusable_file_is_refused(case, raylway, home, tmp_path):
    name, content, message = BAD_DATA[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    check_refused(raylway, home, tmp_path / name, message)


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_unusable_rows_are_refused(case, ray_cluster, home, tmp_path):
    """Stages run in this process; `test_an_unusable_file_is_refused` checks the output of the command."""
    from app.data.prepare import prepare

    change, message = BAD_FRAMES[case]
    change(frame()).to_parquet(path := tmp_path / "data.parquet")
    project = projectfile.load("configs/smoke.yaml", [source(path)])
    with no_new_stage(home), pytest.raises(UserError, match=re.escape(message)):
        prepare(project)


def test_text_in_a_number_column_of_a_csv_file_is_refused(raylway, home, tmp_path):
    bad = frame().astype({"age": object})
    bad.loc[[3, 5], "age"] = "forty"
    bad.to_csv(tmp_path / "data.csv", index=False)
    check_refused(
        raylway, home, tmp_path / "data.csv", "age: must be a number: 2 of 400 rows, such as 'forty'"
    )


def test_csv_and_parquet_are_prepared_to_the_same_parts(ray_cluster, tmp_path):
    from app.data.prepare import prepare

    frame().to_parquet(tmp_path / "data.parquet")
    frame().to_csv(tmp_path / "data.csv", index=False)
    parquet, csv = (
        prepare(projectfile.load("configs/smoke.yaml", [source(tmp_path / name)]))
        for name in ("data.parquet", "data.csv")
    )
    assert csv.preprocessor == parquet.preprocessor
    for part in ("train", "validation", "test"):
        pd.testing.assert_frame_equal(csv.frame(part), parquet.frame(part))


def test_a_tampered_bundle_is_not_served(raylway, home, trained):
    from app.registry import versions

    path = versions.resolve("smoke", "1").path / "schema.json"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"age", b"agf"))
    try:
        refused = raylway("serve", "configs/smoke.yaml", "--set", f"serving.port={free_ports(1)[0]}")
    finally:
        path.write_bytes(original)
    assert refused.returncode == 2, refused.stdout
    assert "schema.json was changed" in refused.stderr


def test_serve_refuses_a_model_without_versions(raylway):
    refused = raylway("serve", "configs/smoke.yaml", "--set", "name=unheard-of")
    assert refused.returncode == 2
    assert "train one first" in refused.stderr


def test_predict_writes_the_predictions_of_the_bundle_beside_the_rows(trained, raylway, home, tmp_path):
    from app.bundle.bundle import Bundle
    from app.bundle.schema import columns_of
    from app.registry import versions

    bundle = Bundle(versions.resolve("smoke", "champion").path)
    rows = json.loads((bundle.path / "example.json").read_text())["rows"]
    frame = pd.DataFrame(rows * 300)
    frame.loc[1, "age"] = -5
    frame["id"] = [f"{number:05d}" for number in range(len(frame))]
    frame["note"] = ["1"] * (len(frame) - 1) + ["NA"]
    for name, write in (("rows.parquet", frame.to_parquet), ("rows.csv", frame.to_csv)):
        write(tmp_path / name, index=False)
        output = tmp_path / f"{name}-answers"
        done = raylway("predict", "smoke@champion", "--input", str(tmp_path / name), "--output", str(output))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{len(frame):,} rows predicted" in done.stdout
        assert "1 of them break the contract" in done.stdout
        answered = pd.read_parquet(output)
        assert answered.loc[1, "violation"].startswith("age: ")
        assert answered[["id", "note"]].equals(frame[["id", "note"]])
        valid = answered["violation"].isna()
        expected = bundle.predict(columns_of(bundle.schema, rows * 300))
        np.testing.assert_allclose(answered.loc[valid, "probability"], expected[valid], rtol=1e-6)
    twice = tmp_path / "twice"
    done = raylway("predict", "smoke", "--input", str(output), "--output", str(twice))
    assert "the prediction columns end in _2" in done.stdout
    both = pd.read_parquet(twice)
    assert both["probability"].equals(both["probability_2"])
    ragged = tmp_path / "ragged.csv"
    ragged.write_text((tmp_path / "rows.csv").read_text() + "1,2,3\n")
    broken = raylway("predict", "smoke", "--input", str(ragged), "--output", str(tmp_path / "never"))
    assert broken.returncode == 2
    assert broken.stderr.startswith(
        f"error: --input: {ragged}: row {len(frame) + 2:,}: has 3 cells, the header 8"
    )
    again = raylway("predict", "smoke", "--input", str(tmp_path / "rows.csv"), "--output", str(output))
    assert (again.returncode, "must not exist" in again.stderr) == (2, True)
    missing = raylway("predict", "smoke", "--input", "gone.csv", "--output", str(tmp_path / "new"))
    assert (missing.returncode, "--input: gone.csv: no such file" in missing.stderr) == (2, True)
