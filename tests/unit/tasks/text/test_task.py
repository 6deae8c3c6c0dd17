"""A text model from its prepared rows to its bundle, its answers and its int8 version; without training."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from app.bundle.bundle import Bundle
from app.bundle.manifest import identity_of, manifest_of, seal
from app.bundle.schema import Schema, columns_of
from app.config import Project
from app.data.prepare import LABEL
from app.errors import UserError
from app.evaluation import card
from app.jobs import quantization
from app.registry import versions
from app.serving.http import Refused
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.traffic.variants import common_schema
from app.tasks import baselines_of, task_of
from app.tasks.text.packager import Packager
from app.tasks.text.task import Task as Text
from tests import bundles, encoders, texts

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoders.build(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(shared_home, monkeypatch):
    """One state directory for all tests here, with the prepared rows in it."""
    monkeypatch.setenv("RAYLWAY_HOME", str(shared_home))
    return shared_home


@pytest.fixture(scope="module")
def made(shared_home, encoder):
    return texts.prepared(shared_home / "stages" / "prepare" / "key", encoder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, encoder, made):
    return texts.build(tmp_path_factory.mktemp("bundles") / "moods", texts.project(encoder), made)


def task(encoder, made, **changes) -> Text:
    project = Project.model_validate({**texts.project(encoder), **changes})
    found = task_of(project, made)
    assert isinstance(found, Text)
    return found


def tensors_of(task: Text, part: str = "train") -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(a) for name, a in task.arrays(task.prepared.frame(part)).items()}


class TestTask:
    def test_a_batch_is_padded_to_its_longest_text(self, encoder, made):
        moods = task(encoder, made)
        arrays = tensors_of(moods)
        assert {name: len(a) for name, a in arrays.items()} == dict.fromkeys(
            ("ids", "lengths", "y", "weight"), 240
        )
        ids, mask, y, weight = moods.batch(arrays, torch.tensor([3, 5]))
        assert ids.shape == mask.shape == (2, int(arrays["lengths"][[3, 5]].max()))
        assert mask.sum(dim=1).tolist() == arrays["lengths"][[3, 5]].tolist()
        assert (y.dtype, weight.tolist()) == (torch.int64, [1, 1])
        assert moods.network().loss(ids, mask, y, weight).isfinite()

    def test_balanced_classes_weigh_the_same(self, encoder, made):
        training = {**texts.project(encoder)["training"], "class_weights": "balanced"}
        arrays = tensors_of(task(encoder, made, training=training))
        sums = [float(arrays["weight"][arrays["y"] == i].sum()) for i in range(3)]
        assert sums == pytest.approx([80, 80, 80], rel=0.01)

    def test_its_outputs_are_in_the_order_of_the_rows(self, encoder, made):
        moods = task(encoder, made)
        arrays, network = tensors_of(moods, "validation"), moods.network().eval()
        with torch.no_grad():
            probabilities, labels = moods.outputs(network, arrays)
            alone = [network(*moods.batch(arrays, torch.tensor([i]))[:2]) for i in range(8)]
        torch.testing.assert_close(probabilities[:8], torch.cat(alone))
        found = moods.metrics(probabilities, labels)
        assert set(found) == {"loss", "macro_f1"}
        assert np.isnan(moods.metrics(probabilities * torch.nan, labels)["loss"])

    def test_a_frozen_encoder_is_asked_once(self, encoder, made):
        frozen = task(encoder, made, model=texts.project(encoder, freeze=True)["model"])
        arrays, network = tensors_of(frozen), frozen.network()
        assert arrays["vectors"].shape == (240, 16)
        assert torch.equal(frozen.arrange(arrays, torch.arange(240), 16), torch.arange(240))
        assert network.loss(*frozen.batch(arrays, torch.arange(5))).isfinite()
        free = task(encoder, made)
        same = free.network()
        same.head.load_state_dict(network.head.state_dict())
        with torch.no_grad():
            expected = free.outputs(same.eval(), tensors_of(free))[0]
            torch.testing.assert_close(frozen.outputs(network.eval(), arrays)[0], expected)

    def test_the_baselines_are_found_and_the_words_beat_the_constant(self, encoder, made):
        scores = baselines_of(task(encoder, made))
        assert scores["constant"]["macro_f1"] < 0.3
        assert scores["tfidf_logistic_regression"]["macro_f1"] > 0.9


class TestBundle:
    def test_answers_texts_as_the_network_does(self, bundle, encoder, made):
        opened = Bundle(bundle)
        opened.check_example()
        frame = made.frame("test")
        given = opened.predict({"text": frame["text"].to_numpy()})
        assert given.shape == (90, 3)
        np.testing.assert_allclose(given.sum(axis=1), 1, atol=1e-6)
        alone = opened.predict({"text": frame["text"].to_numpy()[40:41]})
        np.testing.assert_allclose(alone[0], given[40], atol=1e-6)
        metrics = json.loads((bundle / "metrics.json").read_text())
        assert metrics["onnx_difference"] < 1e-5

    def test_its_metrics_are_told_by_class_and_by_slice(self, bundle):
        metrics = json.loads((bundle / "metrics.json").read_text())
        assert list(metrics["classes"]) == texts.CLASSES
        about = metrics["slices"]["about"]
        assert set(about) == {"flights", "phones", "(missing)"}
        assert sum(each["rows"] for each in about.values()) == 90
        mean = sum(each["rows"] * each["accuracy"] for each in about.values()) / 90
        assert mean == pytest.approx(metrics["model"]["accuracy"])

    def test_its_card_tells_all_of_that(self, bundle):
        card = (bundle / "card.md").read_text()
        assert "Predicts the probabilities that `mood` is `bad`, `fine`, `good`." in card
        for line in ("- train: 240 rows, ", "By class:", "By `about`:", "| phones | ", "| macro f1 |"):
            assert line in card
        assert "- `text`: text, tokens\n" in card


class TestServing:
    @pytest.fixture
    def opened(self, bundle):
        return Bundle(bundle)

    def answered(self, opened: Bundle, rows: list[dict]) -> Answer:
        probabilities = opened.predict(columns_of(opened.schema, rows))
        return Answer(model="moods", variant="a", version="1", request_id="r", probabilities=probabilities)

    def test_the_answer_has_the_label_and_a_probability_for_each_class(self, opened):
        given = self.answered(opened, [{"text": "a good day"}, {"text": "awful"}])
        document = orjson.loads(rows.encode(given, rows.predictions(given, opened.schema)))
        assert document["label"] == {"column": "mood", "classes": texts.CLASSES}
        for prediction, row in zip(document["predictions"], given.probabilities, strict=True):
            assert list(prediction["probabilities"]) == texts.CLASSES
            assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist())
            assert prediction["label"] == texts.CLASSES[row.argmax()]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "must not be missing"),
            ("x" * 201, "at most 200 characters"),
            (7, "must be a string"),
            (None, "must not be missing"),
        ],
    )
    def test_a_text_that_breaks_the_contract_is_refused(self, opened, text, says):
        with pytest.raises(Refused) as caught:
            rows.parse(orjson.dumps({"rows": [{"text": text}]}), Contract(opened.schema, 8))
        (violation,) = caught.value.violations
        assert violation["path"] == "rows.0.text"
        assert says in violation["message"]

    @pytest.mark.parametrize("binary", [False, True])
    def test_the_open_inference_protocol_has_a_column_for_each_class(self, opened, binary):
        contract = Contract(opened.schema, 8)
        tensor = {"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["a good day", "awful"]}
        request = {"inputs": [tensor], "parameters": {"binary_data_output": binary}}
        inference = tensors.parse(orjson.dumps(request), None, contract)
        given = self.answered(opened, inference.query.rows)
        content, _, headers = tensors.encode(given, inference)
        head = orjson.loads(content[: int(headers.get(tensors.HEADER_LENGTH, len(content)))])
        (output,) = head["outputs"]
        assert output["shape"] == [2, 3]
        if binary:
            values = np.frombuffer(content[-output["parameters"]["binary_data_size"] :], "<f4")
        else:
            values = np.array(output["data"])
        np.testing.assert_allclose(values.reshape(2, 3), given.probabilities, atol=1e-6)

    def test_the_metadata_name_the_classes(self, opened):
        document = orjson.loads(tensors.metadata("moods", ["1"], opened.schema))
        assert document["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
        assert document["outputs"][0]["shape"] == [-1, 3]
        assert document["outputs"][0]["parameters"] == {"classes": texts.CLASSES}

    def test_variants_with_other_classes_do_not_fit(self, opened):
        other = opened.schema.model_copy(update={"classes": ["bad", "good"]})
        with pytest.raises(UserError, match=r"differ in label \(mood: bad, fine, good, mood: bad, good\)"):
            common_schema({"a": opened.schema, "b": other})


class TestCompression:
    def test_the_int8_version_is_a_bundle_whose_card_says_what_it_cost(self, bundle):
        made = quantization.compress(bundle)
        before, after = made.comparison["before"], made.comparison["after"]
        smaller = Bundle(made.path)
        smaller.check_example()
        assert after["bytes"] == (made.path / "model.onnx").stat().st_size
        assert before["ms_1"] > 0 < after["ms_32"]
        assert abs(before["score"] - after["score"]) < 0.2
        assert smaller.manifest["compressed_from"] == {
            "identity": identity_of(bundle),
            "decision": bundles.PASSED,
        }
        assert "## Compression" in (made.path / "card.md").read_text()
        assert quantization.compress(bundle).path == made.path, "not made twice"
        with pytest.raises(UserError, match="is an int8 bundle already"):
            quantization.compress(made.path)

    def test_its_products_are_of_integers(self, bundle):
        import onnx

        graph = onnx.load(quantization.compress(bundle).path / "model.onnx").graph
        assert sum("Integer" in node.op_type for node in graph.node) >= 8

    def test_one_that_loses_too_much_is_refused_and_not_kept(self, tmp_path, encoder, made, monkeypatch):
        project = {**texts.project(encoder), "compression": {"max_loss": 0.0}}
        path = texts.build(tmp_path / "moods", project, made)
        real = Packager.evaluate

        def worse(self, bundle: Bundle):
            found = copy.deepcopy(real(self, bundle))
            found["model"]["macro_f1"] -= 0.0 if bundle.manifest else 0.05
            return found

        monkeypatch.setattr(Packager, "evaluate", worse)
        with pytest.raises(UserError, match=r"int8 loses 0\.\d+ of macro_f1 .* compression.max_loss is 0"):
            quantization.compress(path)
        monkeypatch.setattr(Packager, "evaluate", real)

    @pytest.mark.parametrize(
        ("passed", "status", "says", "aliases"),
        [
            (True, 0, "moods version 1 (champion)", [["champion"]]),
            (
                False,
                2,
                "the bundle that it was made of must have passed the gate, which refused it: poor",
                [],
            ),
        ],
    )
    def test_the_int8_version_of_what_the_gate_refused_is_not_registered(
        self, tmp_path, shared_home, encoder, made, monkeypatch, passed, status, says, aliases
    ):
        """Though the gate would let the int8 version itself pass, and nothing is registered yet."""
        monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "home"))
        shutil.copytree(shared_home / "stages", tmp_path / "home" / "stages")
        path = texts.build(
            tmp_path / "moods", {**texts.project(encoder), "gate": {"metric": "macro_f1", "beat": []}}, made
        )
        facts = {
            name: value for name, value in manifest_of(path).items() if name not in ("files", "decision")
        }
        seal(path, {**facts, "decision": {"passed": passed, "reason": "poor"}})
        command = [sys.executable, "-m", "app", "compress", str(path), "--register"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        assert says in done.stdout + done.stderr
        assert [list(version.aliases) for version in versions.versions("moods")] == aliases

    def test_without_the_test_part_there_is_nothing_to_judge_it_on(self, tmp_path, bundle, monkeypatch):
        monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
        with pytest.raises(UserError, match="is gone; run `raylway train` again"):
            quantization.compress(bundle)


def test_the_schema_of_a_binary_bundle_is_read_as_before():
    old = {"name": "income", "inputs": [], "label": "income", "positive": ">50K"}
    assert Schema.model_validate(old).task == "binary"


def test_a_card_says_what_an_int8_version_cost(encoder, made, bundle):
    project = Project.model_validate(texts.project(encoder))
    evaluation = json.loads((bundle / "metrics.json").read_text())
    size = {"bytes": 2_000_000, "ms_1": 3.0, "ms_32": 40.0, "score": 0.8}
    comparison = {"metric": "macro_f1", "changed": 0.01, "before": size, "after": {**size, "bytes": 500_000}}
    text = card.render(project, made.summary, {**evaluation, "compression": comparison})
    assert "| size of the graph | 2.00 MB | 0.50 MB |" in text
    assert "| test macro_f1 | 0.8000 | 0.8000 |" in text
    assert made.frame("test")[LABEL].dtype == np.int64


def test_a_tabular_graph_is_quantised_too(tmp_path):
    path = bundles.build(tmp_path / "income", seed=0)
    opened = Bundle(path)
    columns = columns_of(opened.schema, bundles.ROWS)
    expected = opened.predict(columns)
    quantization.quantize(path / "model.onnx", tmp_path / "int8.onnx")
    (path / "model.onnx").write_bytes((tmp_path / "int8.onnx").read_bytes())
    np.testing.assert_allclose(Bundle(path, sealed=False).predict(columns), expected, atol=0.03)
