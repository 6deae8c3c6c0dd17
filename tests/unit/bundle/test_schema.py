import json

from app.bundle.schema import Schema, schema_at

OLD = {"name": "income", "inputs": [], "label": "income", "positive": ">50K"}


def test_a_schema_without_a_task_is_binary():
    assert Schema.model_validate(OLD).task == "binary"


def test_strings_for_missing_values_are_read_from_the_project_of_an_older_bundle(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(OLD))
    assert schema_at(tmp_path).missing == []
    (tmp_path / "project.json").write_text(json.dumps({"data": {"missing": ["?"]}}))
    assert schema_at(tmp_path).missing == ["?"]
    (tmp_path / "schema.json").write_text(json.dumps({**OLD, "missing": ["-"]}))
    assert schema_at(tmp_path).missing == ["-"]
