from pathlib import Path

import pytest

from app.config import Project
from app.data.partition import PARTITION_FILE, partition_of
from app.data.prepare import Prepared
from app.jobs import pipeline
from app.registry import versions
from app.registry.versions import Version
from tests.bundles import PROJECT

BASE = Project.model_validate(PROJECT)


@pytest.mark.parametrize(
    ("training", "description"),
    [
        ({}, "mlp, 1 Horovod workers"),
        ({"num_workers": 2, "backend": "ddp"}, "mlp, 2 DDP workers"),
    ],
)
def test_a_training_is_described(training, description):
    project = Project.model_validate({**PROJECT, "training": {**PROJECT["training"], **training}})
    assert pipeline._describe_training(project) == description


def test_parts_are_described(tmp_path):
    (tmp_path / "summary.json").write_text(
        '{"parts": {"train": {"rows": 34000}, "validation": {"rows": 5}, "test": {"rows": 9}}}'
    )
    prepared = Prepared(tmp_path, cached=True)
    assert pipeline._describe_parts(prepared) == "34,000 train, 5 validation, 9 test rows"


def test_without_a_champion_the_split_key_is_the_projects_own(monkeypatch):
    monkeypatch.setattr(versions, "find", lambda *_: None)
    assert pipeline.with_champion_key(BASE) == BASE


def test_the_champions_split_key_stays_when_a_column_is_added(monkeypatch, tmp_path):
    (tmp_path / PARTITION_FILE).write_text(partition_of(BASE.data, None).model_dump_json())
    monkeypatch.setattr(Version, "path", property(lambda self: Path(tmp_path)))
    monkeypatch.setattr(versions, "find", lambda *_: Version("income", "1", ("champion",), "identity"))
    data = {**PROJECT["data"], "columns": {**PROJECT["data"]["columns"], "new": {"type": "number"}}}
    more = Project.model_validate({**PROJECT, "data": data})
    assert pipeline.with_champion_key(more).data.split_key == BASE.data.split_key
