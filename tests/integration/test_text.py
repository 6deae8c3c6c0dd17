"""Commands train, evaluate, register and compress a text model with a tiny encoder on two ranks."""

import json

import pytest
import yaml

from tests import encoders, texts

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A project file; its rows are in a file in the same folder."""
    folder = tmp_path_factory.mktemp("moods")
    project = texts.project(encoders.build(folder / "encoder"))
    rows = texts.rows(1500).drop(columns="__label__").drop_duplicates("text")
    rows.to_parquet(folder / "rows.parquet")
    project["data"]["source"]["path"] = str(folder / "rows.parquet")
    project["training"] |= {"epochs": 6, "learning_rate": 0.02}
    project["gate"]["beat"] = ["constant"]
    (folder / "moods.yaml").write_text(yaml.safe_dump(project))
    return folder / "moods.yaml"


def test_a_text_model_is_trained_evaluated_by_slice_registered_and_compressed(raylway, file):
    trained = raylway("train", str(file), timeout=300)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "moods version 1 (champion)" in trained.stdout

    from app.bundle.bundle import Bundle
    from app.registry import versions

    version = versions.resolve("moods", "champion")
    bundle = Bundle(version.path)
    bundle.check_example()
    metrics = json.loads((version.path / "metrics.json").read_text())
    assert metrics["model"]["macro_f1"] > 0.8
    assert set(metrics["slices"]["about"]) == {"flights", "phones", "(missing)"}
    assert set(metrics["baselines"]) == {"constant", "tfidf_logistic_regression"}
    assert metrics["onnx_difference"] < 1e-4

    for _ in range(2):  # the second time registers no other version
        compressed = raylway("compress", str(version.path), "--register", timeout=300)
        assert compressed.returncode == 0, compressed.stdout + compressed.stderr
        assert "test macro_f1" in compressed.stdout
        assert "moods version 2 (challenger)" in compressed.stdout
    smaller = versions.resolve("moods", "challenger")
    Bundle(smaller.path).check_example()
    assert (smaller.path / "model.onnx").stat().st_size < (version.path / "model.onnx").stat().st_size

    overrides = ("--set", "model.freeze=true", "--set", "gate.beat=[]", "--set", "training.epochs=1")
    frozen = raylway("train", str(file), *overrides, timeout=300)
    assert "text_classifier, 2 Horovod workers" in frozen.stdout, frozen.stdout + frozen.stderr
