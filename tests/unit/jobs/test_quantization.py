"""The int8 version of a bundle: of a text classifier, and of a tabular model."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from app.bundle.bundle import Bundle
from app.bundle.manifest import identity_of, manifest_of, seal
from app.bundle.schema import columns_of
from app.config import Project
from app.errors import UserError
from app.evaluation import card
from app.jobs import quantization
from app.registry import versions
from app.tasks.text.packager import Packager
from tests import bundles, encoders, texts
from tests.documents import ROOT


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoders.build(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(shared_home, monkeypatch):
    """One state directory for all tests of the module, with the prepared rows."""
    monkeypatch.setenv("RAYLWAY_HOME", str(shared_home))
    return shared_home


@pytest.fixture(scope="module")
def prepared(shared_home, encoder):
    return texts.prepared(shared_home / "stages" / "prepare" / "key", encoder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, encoder, prepared):
    project = {**texts.project(encoder), "gate": {"metric": "macro_f1", "beat": []}}
    return texts.build(tmp_path_factory.mktemp("bundles") / "moods", project, prepared)


def test_the_int8_version_is_a_bundle_with_its_cost_on_the_card(bundle):
    compressed = quantization.compress(bundle)
    before, after = compressed.comparison["before"], compressed.comparison["after"]
    int8 = Bundle(compressed.path)
    int8.check_example()
    assert after["bytes"] == (compressed.path / "model.onnx").stat().st_size
    assert before["ms_1"] > 0 < after["ms_32"]
    assert abs(before["score"] - after["score"]) < 0.2
    assert int8.manifest["compressed_from"] == {
        "identity": identity_of(bundle),
        "decision": bundles.PASSED,
    }
    assert "## Compression" in (compressed.path / "card.md").read_text()
    assert quantization.compress(bundle).path == compressed.path, "the int8 bundle is built once"
    with pytest.raises(UserError, match="is an int8 bundle already"):
        quantization.compress(compressed.path)


def test_the_int8_version_multiplies_integers(bundle):
    import onnx

    graph = onnx.load(quantization.compress(bundle).path / "model.onnx").graph
    assert sum("Integer" in node.op_type for node in graph.node) >= 8


def test_a_bundle_that_loses_too_much_is_refused(tmp_path, encoder, prepared, monkeypatch):
    project = {**texts.project(encoder), "compression": {"max_loss": 0.0}}
    path = texts.build(tmp_path / "moods", project, prepared)
    original = Packager.evaluate

    def worse(self, bundle: Bundle):
        evaluation = copy.deepcopy(original(self, bundle))
        evaluation["model"]["macro_f1"] -= 0.0 if bundle.manifest else 0.05
        return evaluation

    monkeypatch.setattr(Packager, "evaluate", worse)
    with pytest.raises(UserError, match=r"compression.max_loss is 0, but int8 loses 0\.\d+ of macro_f1"):
        quantization.compress(path)
    monkeypatch.setattr(Packager, "evaluate", original)


@pytest.mark.parametrize(
    ("passed", "status", "message", "aliases"),
    [
        (True, 0, "moods version 1 (champion)", [["champion"]]),
        (
            False,
            2,
            "the bundle that it was compressed from must have passed the gate, which refused it: poor",
            [],
        ),
    ],
)
def test_the_int8_version_of_a_rejected_bundle_is_not_registered(
    tmp_path, shared_home, mlflow_tables, bundle, monkeypatch, passed, status, message, aliases
):
    """This holds even if the int8 version itself would pass the gate."""
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "home"))
    shutil.copytree(shared_home / "stages", tmp_path / "home" / "stages")
    shutil.copy(mlflow_tables, tmp_path / "home" / "mlflow.db")
    path = shutil.copytree(bundle, tmp_path / "moods")
    facts = {name: value for name, value in manifest_of(path).items() if name not in ("files", "decision")}
    seal(path, {**facts, "decision": {"passed": passed, "reason": "poor"}})
    command = [sys.executable, "-m", "app", "compress", str(path), "--register"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert [list(version.aliases) for version in versions.versions("moods")] == aliases


def test_a_bundle_whose_test_part_is_missing_is_not_compressed(tmp_path, bundle, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    with pytest.raises(UserError, match="was removed; run `raylway train` again"):
        quantization.compress(bundle)


def test_the_card_shows_the_cost_of_the_int8_version(encoder, prepared, bundle):
    project = Project.model_validate(texts.project(encoder))
    evaluation = json.loads((bundle / "metrics.json").read_text())
    size = {"bytes": 2_000_000, "ms_1": 3.0, "ms_32": 40.0, "score": 0.8}
    comparison = {"metric": "macro_f1", "changed": 0.01, "before": size, "after": {**size, "bytes": 500_000}}
    text = card.render(project, prepared.summary, {**evaluation, "compression": comparison})
    assert "1.0% of test predictions changed" in text
    assert "| size of the graph | 2.00 MB | 0.50 MB |" in text
    assert "| test macro_f1 | 0.8000 | 0.8000 |" in text


def test_a_tabular_graph_is_quantized(tmp_path):
    path = bundles.build(tmp_path / "income", seed=0)
    opened = Bundle(path)
    columns = columns_of(opened.schema, bundles.ROWS)
    expected = opened.predict(columns)
    quantization.quantize(path / "model.onnx", tmp_path / "int8.onnx")
    (path / "model.onnx").write_bytes((tmp_path / "int8.onnx").read_bytes())
    np.testing.assert_allclose(Bundle(path, sealed=False).predict(columns), expected, atol=0.03)
