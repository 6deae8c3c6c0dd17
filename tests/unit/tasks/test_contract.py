"""The contract that every family of models must keep: one suite for all families.

The last family is the smallest possible one, in tests/unit/tasks/smallest: a folder of `app.tasks` and an
entry of FAMILIES are all that it needs.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app import tasks
from app.bundle.bundle import Bundle, Ranking
from app.bundle.manifest import verify
from app.bundle.schema import Schema, columns_of
from app.config import FAMILIES
from app.data import partition
from app.evaluation import card
from app.jobs import candidate, quantization
from app.state import fingerprint
from app.tasks.onnx import MAX_DIFFERENCE
from app.training import trainer
from tests import families
from tests.application import copy_application, forget_code, forget_sources
from tests.documents import ROOT
from tests.families import Built, example_of, tensors
from tests.unit.tasks.smallest.settings import Threshold

NAMES = [*FAMILIES, "smallest"]
CASES = [(family, name) for family in NAMES for name in example_of(family).MODELS]


@pytest.fixture(scope="module", autouse=True)
def application(tmp_path_factory):
    """A copy of the application that has the smallest family too, and whose code the stage keys follow."""
    folder = tmp_path_factory.mktemp("source")
    copy = copy_application(folder)
    shutil.copytree(ROOT / "tests" / "unit" / "tasks" / "smallest", copy / "tasks" / "smallest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "ROOT", folder)
        patch.setattr(tasks, "__path__", [*tasks.__path__, str(copy / "tasks")])
        patch.setitem(FAMILIES, "smallest", (Threshold,))
        forget_code()
        yield copy
    forget_code()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def built(request, build, application) -> Built:
    return build(*request.param)


def evaluation_of(built: Built) -> dict:
    """The evaluation in the bundle."""
    return json.loads((built.bundle.path / "metrics.json").read_text())


def answer_of(bundle: Bundle, rows) -> np.ndarray:
    answer = bundle.answer(rows)
    return answer.scores if isinstance(answer, Ranking) else answer


@pytest.mark.parametrize("family", NAMES)
def test_every_kind_has_an_example(family, tmp_path):
    example = example_of(family)
    kinds = {type(example.project(name, tmp_path).model) for name in example.MODELS}
    assert kinds == set(FAMILIES[family])


# The settings


def test_the_settings_name_what_the_family_gives(built):
    model, evaluation = built.task.project.model, evaluation_of(built)
    assert model.score == built.task.score
    assert set(model.validation_metrics) <= set(built.validation[1])
    assert {model.score, *model.test_metrics} <= set(evaluation["model"])
    assert set(model.baselines) == set(evaluation["baselines"])


def test_a_project_is_the_same_after_json(built):
    project = built.task.project
    assert type(project).model_validate_json(project.model_dump_json()) == project


# The task


def test_arrays_have_a_row_for_each_row_and_do_not_change(built):
    frame = built.task.prepared.frame("train")
    arrays, again = built.task.arrays(frame), built.task.arrays(frame)
    for name, array in arrays.items():
        assert len(array) == len(frame) > 0
        assert array.flags.writeable, "PyTorch shares the memory, and warns if it is read-only"
        np.testing.assert_array_equal(array, again[name])


def test_a_network_is_determined_by_the_seed(built):
    networks = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            networks.append(built.task.network().state_dict())
    first, same, other = networks
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_trainable_parameter_is_in_one_group_and_learns(built):
    with torch.random.fork_rng():
        torch.manual_seed(built.task.project.seed)
        network = built.task.network()
    grouped = [id(p) for group in built.task.parameter_groups(network) for p in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for p in network.parameters() if p.requires_grad}
    for (name, before), after in zip(network.named_parameters(), built.network.parameters(), strict=True):
        assert torch.equal(before, after) != before.requires_grad, name


def test_an_arranged_epoch_has_every_row_once(built):
    arrays = tensors(built.task, "train")
    num_rows = len(next(iter(arrays.values())))
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    arranged = built.task.arrange(arrays, order, 8)
    assert sorted(arranged.tolist()) == list(range(num_rows))


def test_the_loss_of_a_batch_is_one_finite_number(built):
    arrays = tensors(built.task, "train")
    for rows in (torch.arange(16), torch.tensor([3])):
        loss = built.network.loss(*built.task.batch(arrays, rows))
        assert loss.shape == ()
        assert loss.isfinite()


def test_training_raises_the_score(built):
    before, after = built.validation
    assert after[built.task.score] > before[built.task.score]


def test_the_outputs_of_ranks_are_joined_along_the_rows(built):
    arrays = tensors(built.task, "validation")
    halves = [{name: array[half::2] for name, array in arrays.items()} for half in (0, 1)]
    with torch.no_grad():
        whole = built.task.outputs(built.network, arrays)
        parts = [built.task.outputs(built.network, half) for half in halves]
    joined = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    num_rows = len(next(iter(arrays.values())))
    assert {len(output) for output in whole} == {num_rows}
    expected = built.task.metrics(*whole)
    assert built.task.metrics(*joined) == pytest.approx(expected, abs=1e-5)


def test_a_diverged_network_has_no_finite_loss(built):
    network = built.task.network().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(math.nan)
    assert not math.isfinite(families.validate(built.task, network)["loss"])


# The bundle


def test_the_bundle_answers_like_the_network(built):
    test = built.task.prepared.frame("test")
    answer, expected = answer_of(built.bundle, test), built.example.answers(built.task, built.network, test)
    assert answer.dtype == np.float32
    assert answer.shape == expected.shape
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=MAX_DIFFERENCE)
    assert len(np.unique(answer)) > 20, "equal answers would prove nothing"
    np.testing.assert_allclose(answer_of(built.bundle, test[4:5]), answer[4:5], rtol=1e-4, atol=1e-5)


def test_the_bundle_predicts_its_own_example(built):
    built.bundle.check_example()
    example = json.loads((built.bundle.path / "example.json").read_text())
    assert len(answer_of(built.bundle, columns_of(built.bundle.schema, example["rows"]))) > 0


def test_the_bundle_is_sealed_with_all_its_files(built):
    manifest = verify(built.bundle.path)
    assert {"model.onnx", "model.safetensors", "schema.json", "project.json", "metrics.json"} <= set(
        manifest["files"]
    )
    assert {"card.md", "example.json", "reference.parquet", partition.PARTITION_FILE} <= set(
        manifest["files"]
    )
    weights = load_file(built.bundle.path / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in built.network.state_dict().items())


def test_the_schema_has_the_inputs_and_the_prediction(built):
    schema, project = built.packager.schema(), built.task.project
    assert Schema.model_validate_json(schema.model_dump_json()) == schema == built.bundle.schema
    assert schema.name == project.name
    for item in schema.inputs:
        assert item.contract == project.data.columns[item.name]
    if interactions := project.data.interactions:
        assert (schema.task, schema.label) == ("ranking", interactions.item)
    else:
        label = project.data.target
        task = "classes" if label.classes else "binary"
        assert (schema.task, schema.label, schema.classes) == (task, label.column, label.classes or [])


def test_an_evaluation_is_of_the_test_part_or_some_rows_of_it(built):
    evaluation = built.packager.evaluate(built.bundle)
    assert all(math.isfinite(value) for value in evaluation["model"].values())
    num_rows = len(built.task.prepared.frame("test"))
    every, some = np.ones(num_rows, dtype=bool), np.arange(num_rows) % 2 == 0
    assert built.packager.evaluate(built.bundle, every) == evaluation
    assert built.packager.evaluate(built.bundle, some)["model"] != evaluation["model"]


def test_the_card_shows_the_model_beside_its_baselines(built):
    evaluation = evaluation_of(built)
    assert 0 <= evaluation["onnx_difference"] <= MAX_DIFFERENCE
    text = card.render(built.task.project, built.task.prepared.summary, evaluation)
    assert text == (built.bundle.path / "card.md").read_text()
    for name in built.task.project.model.baselines:
        assert f"| {name.replace('_', ' ')} | " in text


def test_baselines_have_the_metrics_of_the_gate(built):
    ratings = {"r2"}  # recommenders without a model of ratings have none
    metrics = set(built.task.project.model.test_metrics) - ratings
    for scores in evaluation_of(built)["baselines"].values():
        assert metrics <= set(scores)
        assert all(math.isfinite(value) for value in scores.values())


# The stages


def keys(built: Built, **changes) -> dict[str, str]:
    project = built.task.project.model_copy(update=changes)
    prepared = built.task.prepared
    return {
        "baselines": candidate.baselines_key(project, prepared),
        "train": trainer.key(project, prepared),
        "bundle": candidate.key(project, prepared),
        "compress": quantization.key(project, "identity"),
    }


def test_a_finished_stage_is_not_repeated(built, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(built.home))
    scores = candidate.baselines(built.task)
    assert scores == evaluation_of(built)["baselines"]
    before = built.bundle.path.stat().st_mtime_ns
    path = candidate.build(built.task.project, built.task, built.trained, scores)
    assert (path, path.stat().st_mtime_ns) == (built.bundle.path, before)


def test_other_seeds_and_settings_have_other_stages(built):
    before, seed = keys(built), keys(built, seed=7)
    assert len(set(before.values())) == 4
    assert all(before[stage] != seed[stage] for stage in ("baselines", "train", "bundle"))
    training = built.task.project.training.model_copy(update={"learning_rate": 0.5})
    changed = keys(built, training=training)
    assert {stage for stage in before if before[stage] != changed[stage]} == {"train", "bundle"}


@pytest.mark.parametrize("family", NAMES)
def test_the_keys_follow_the_code_of_the_family(family, build, application):
    built = build(family, next(iter(example_of(family).MODELS)))
    stages = {
        "baselines": {"baselines"},
        "packager": {"bundle", "compress"},
        "task": {"baselines", "train", "bundle", "compress"},
    }
    for module, depending in stages.items():
        before = keys(built)
        file = application / "tasks" / family / f"{module}.py"
        source = file.read_text()
        file.write_text(f"{source}# changed\n")
        forget_sources()
        after = keys(built)
        file.write_text(source)
        forget_sources()
        assert {stage for stage in before if before[stage] != after[stage]} == depending, module
