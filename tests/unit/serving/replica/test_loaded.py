import json

import numpy as np
import pytest
from ray import serve

from app.bundle.schema import columns_of
from app.errors import UserError
from app.serving.replica.loaded import Loaded
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from tests.bundles import ROWS, build, schema


@pytest.fixture
def variants(tmp_path):
    """Two variants with different bundles."""
    return {
        name: DeployedVariant(version=str(number), weight=1, path=build(tmp_path / name, seed=number))
        for number, name in enumerate(("champion", "challenger"), start=1)
    }


def make_traffic(variants):
    return Traffic(salt="1", policy="weighted", variants=variants)


def test_every_variant_is_opened_and_answers_its_share_of_units(variants):
    loaded = Loaded(make_traffic(variants), max_rows=8)
    assert loaded.versions == {"champion": "1", "challenger": "2"}
    chosen = {loaded.choose(f"user-{number}") for number in range(100)}
    assert chosen == {"champion", "challenger"}
    columns = columns_of(loaded.schema, ROWS)
    first, second = (loaded.bundles[name].predict(columns) for name in variants)
    assert not np.allclose(first, second)


def test_a_single_variant_answers_every_unit(variants):
    dark = variants["challenger"].model_copy(update={"weight": 0})
    loaded = Loaded(make_traffic({"champion": variants["champion"], "challenger": dark}), max_rows=8)
    assert {loaded.choose(f"user-{number}") for number in range(100)} == {"champion"}
    assert loaded.versions == {"champion": "1", "challenger": "2"}, "a client may request it by version"


def test_bundles_are_reused_and_new_ones_are_verified(variants):
    champion = Loaded(make_traffic({"champion": variants["champion"]}), max_rows=8)
    (variants["champion"].path / "model.onnx").write_bytes(b"")  # would fail if it were opened again
    both = Loaded(make_traffic(variants), 8, champion)
    assert both.bundles["champion"] is champion.bundles["champion"]
    (variants["challenger"].path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="was changed"):
        Loaded(make_traffic(variants), 8, champion)


def test_variants_with_workers_are_not_opened_and_shadows_cannot_be_asked_for(variants, monkeypatch):
    applications = []
    monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app_name: applications.append(app_name))
    update = {"weight": 0, "shadow": True, "workers": "income@2"}
    variants["challenger"] = variants["challenger"].model_copy(update=update)
    loaded = Loaded(make_traffic(variants), max_rows=8)
    assert set(loaded.bundles) == {"champion"}
    assert (set(loaded.workers), applications) == ({"challenger"}, ["income@2"])
    assert loaded.versions == {"champion": "1"}


def test_the_example_is_a_stored_row_with_its_answer(variants):
    loaded = Loaded(make_traffic(variants), max_rows=8)
    example = loaded.example()
    stored = json.loads((variants["champion"].path / "example.json").read_text())
    assert example["row"] == stored["rows"][0]
    (prediction,) = example["answer"]["predictions"]
    expected = loaded.bundles["champion"].predict(columns_of(schema(), stored["rows"][:1]))
    assert prediction["probability"] == pytest.approx(float(expected[0]), abs=1e-5)


def test_the_metadata_names_one_version_or_all(variants):
    loaded = Loaded(make_traffic(variants), max_rows=8)
    assert json.loads(loaded.metadata("income", None))["versions"] == ["1", "2"]
    assert json.loads(loaded.metadata("income", "2"))["versions"] == ["2"]
