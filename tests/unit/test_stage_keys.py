"""The key of a stage changes with each module that the stage uses, and with no other module.

The tests change a copy of the application, for every stage and every family.
"""

import pytest

from app.config import FAMILIES
from app.data import prepare, tokens
from app.data.prepare import Prepared
from app.jobs import candidate, quantization
from app.state import fingerprint
from app.training import trainer
from tests.application import copy_application, forget_code, forget_sources
from tests.documents import ROOT
from tests.families import example_of

STAGES = {
    "prepare": lambda project, prepared: prepare.key(project, "version"),
    "baselines": candidate.baselines_key,
    "train": trainer.key,
    "bundle": candidate.key,
    "compress": lambda project, prepared: quantization.key(project, "identity"),
}
USED = {
    "prepare": "data.sources.files data.cells.numbers data.interactions config.data state.stages state.files",
    "baselines": "data.prepare tasks.{family}.baselines",
    "train": "data.prepare training.loop training.schedule training.workers.horovod tasks "
    "tasks.{family}.task tasks.{family}.network",
    "bundle": "training.loop tasks.{family}.packager tasks.{family}.graph tasks.onnx evaluation.card "
    "bundle.bundle bundle.manifest bundle.schema registry.flavor",
    "compress": "jobs.quantization tasks.{family}.packager bundle.manifest evaluation.card",
}
UNUSED = {
    "prepare": "bundle.bundle training.loop tasks.{family}.task cli.main",
    "baselines": "tasks.{family}.packager tasks.{family}.graph tasks.{other}.baselines training.loop",
    "train": "tasks.{family}.packager tasks.{family}.graph tasks.{family}.baselines tasks.{other}.network "
    "tasks.{other}.task evaluation.card bundle.bundle console registry.versions "
    "serving.replica.endpoint",
    "bundle": "tasks.{other}.graph tasks.{other}.packager registry.versions console state.audit",
    "compress": "tasks.{other}.packager jobs.compress registry.versions state.audit",
}
OTHER_FAMILY = dict(zip(FAMILIES, [*list(FAMILIES)[1:], *FAMILIES], strict=False))
"""For each family, a different one."""


@pytest.fixture
def change(tmp_path, monkeypatch):
    """Change a module in a copy of the application, from which fingerprints are computed."""
    copy_application(tmp_path)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    monkeypatch.setattr(tokens, "version", lambda encoder: "version")

    def change_module(module):
        path = tmp_path.joinpath("app", *module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        file.write_text(f"{file.read_text()}# changed\n")
        forget_sources()

    forget_code()
    yield change_module
    forget_code()


def modules(names: str, family: str) -> list[str]:
    """The module names for a family, without the modules that this family does not have."""
    all_names = [name.format(family=family, other=OTHER_FAMILY[family]) for name in names.split()]
    return [name for name in all_names if not name.startswith("tasks.") or is_module(name)]


def is_module(name: str) -> bool:
    path = (ROOT / "app").joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_of_a_stage_changes_with_the_modules_that_it_uses_and_no_others(
    family, stage, change, tmp_path
):
    example = example_of(family)
    project = example.project(next(iter(example.MODELS)), tmp_path)
    prepared = Prepared(tmp_path / "prepared", cached=True)
    keys = [STAGES[stage](project, prepared)]
    for module in modules(UNUSED[stage], family):
        change(module)
    assert STAGES[stage](project, prepared) == keys[0]
    for module in modules(USED[stage], family):
        change(module)
        keys.append(STAGES[stage](project, prepared))
        assert keys[-1] not in keys[:-1], module


def test_another_release_of_a_library_changes_the_fingerprint(monkeypatch):
    before = fingerprint.fingerprint("app.tasks.tabular.graph")
    monkeypatch.setattr(fingerprint, "_version", lambda name: "99" if name == "onnx" else before[name])
    assert fingerprint.fingerprint("app.tasks.tabular.graph") == before | {"onnx": "99"}
