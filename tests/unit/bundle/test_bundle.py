import json
import shutil

import numpy as np
import pytest

from app.bundle import manifest
from app.bundle.bundle import Bundle, feed_of
from app.bundle.manifest import MANIFEST, BrokenBundle, identity_of, seal, verify
from app.bundle.schema import columns_of
from tests.bundles import EDUCATION, PASSED, ROWS, build


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sealed") / "bundle", seed=0)


@pytest.fixture
def copy(sealed, tmp_path):
    """A bundle that a test may damage."""
    return shutil.copytree(sealed, tmp_path / "bundle")


def refusal(path) -> str:
    """The message with which both `verify` and `Bundle` refuse a bundle. It names the folder."""
    with pytest.raises(BrokenBundle) as verified:
        verify(path)
    with pytest.raises(BrokenBundle) as opened:
        Bundle(path)
    assert str(verified.value) == str(opened.value)
    assert str(path) in str(opened.value)
    return str(opened.value)


def test_the_manifest_lists_every_file_and_the_facts(sealed):
    manifest = verify(sealed)
    assert sorted(manifest["files"]) == ["example.json", "model.onnx", "reference.parquet", "schema.json"]
    assert manifest["seed"] == 0
    assert {"git_commit", "python"} <= set(manifest)


def test_a_bundle_opens_with_its_schema_and_predicts(sealed):
    opened = Bundle(sealed)
    probabilities = opened.predict(columns_of(opened.schema, ROWS))
    assert probabilities.shape == (len(ROWS),)
    assert probabilities.dtype == np.float32
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert len(set(probabilities)) == len(ROWS)
    known_values = {i.name: i.known for i in opened.schema.inputs}
    assert known_values == {
        "age": None,
        "hours-per-week": None,
        "education": EDUCATION,
        "workclass": ["Private", "State-gov"],
        "gender": ["Female", "Male"],
    }


def test_an_unsealed_bundle_predicts_the_same(sealed, tmp_path):
    opened = Bundle(sealed)
    columns = columns_of(opened.schema, ROWS)
    expected = opened.predict(columns)
    draft = shutil.copytree(sealed, tmp_path / "draft")
    (draft / MANIFEST).unlink()
    np.testing.assert_array_equal(Bundle(draft, sealed=False).predict(columns), expected)


def test_a_row_is_predicted_the_same_in_any_batch(sealed):
    opened = Bundle(sealed)
    one_by_one = [opened.predict(columns_of(opened.schema, [row]))[0] for row in ROWS]
    np.testing.assert_allclose(opened.predict(columns_of(opened.schema, ROWS)), one_by_one, atol=1e-6)


def test_an_absent_key_is_missing(sealed):
    schema = Bundle(sealed).schema
    columns = columns_of(schema, [{"age": 3, "beyond": 1}, {"age": None, "gender": "Male"}])
    assert list(columns) == [i.name for i in schema.inputs]
    assert columns["gender"].tolist() == [None, "Male"]
    np.testing.assert_array_equal(columns["age"], [3.0, np.nan])


def test_inputs_are_float64_and_strings_without_null():
    feed = feed_of(
        {
            "int": np.array([1, 2]),
            "bool": np.array([True, False]),
            "float": np.array([1.5, np.nan], np.float32),
            "text": np.array(["a", None], dtype=object),
            "nan": np.array(["a", np.nan], dtype=object),
            "fixed": np.array(["a", "bc"]),
        }
    )
    assert [values.dtype for values in feed.values()] == [np.float64] * 3 + [object] * 3
    assert feed["text"].tolist() == feed["nan"].tolist() == ["a", ""]
    assert feed["fixed"].tolist() == ["a", "bc"]
    np.testing.assert_array_equal(feed["float"], [1.5, np.nan])


def test_a_bundle_predicts_its_own_example(sealed):
    example = json.loads((sealed / "example.json").read_text())
    assert example["rows"][0] == ROWS[0]
    assert example["rows"][1]["workclass"] is None
    Bundle(sealed).check_example()


def test_a_bundle_with_another_prediction_for_its_example_is_refused(copy):
    example = json.loads((copy / "example.json").read_text())
    example["probability"][0] += 0.001
    (copy / "example.json").write_text(json.dumps(example))
    seal(copy, {})
    with pytest.raises(BrokenBundle, match=r"its example\.json, but they differ by 0\.001"):
        Bundle(copy).check_example()


@pytest.mark.parametrize("name", ["model.onnx", "schema.json", "example.json"])
def test_a_changed_file_is_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert f": {name} was changed;" in refusal(copy)


@pytest.mark.parametrize("name", ["model.onnx", "schema.json", "example.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert f": {name} is missing;" in refusal(copy)


FOREIGN = ["model.pkl", "hook.py", "deep/extra.txt", f"deep/{MANIFEST}", ".DS_Store", "registered_model_meta"]


@pytest.mark.parametrize("name", [*FOREIGN, "tokenizer.json", "model.onnx~", ".schema.json.swp"])
def test_files_of_other_programs_are_neither_refused_nor_opened_nor_copied(sealed, copy, tmp_path, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("not a file that a bundle could open")
    opened, original = Bundle(copy), Bundle(sealed)
    columns = columns_of(original.schema, ROWS)
    np.testing.assert_array_equal(opened.predict(columns), original.predict(columns))
    assert identity_of(copy) == identity_of(sealed)
    (tmp_path / "private").mkdir()
    manifest.copy(copy, tmp_path / "private")
    private = {file.name for file in (tmp_path / "private").iterdir()}
    assert private == {*original.manifest["files"], MANIFEST}


@pytest.mark.parametrize("name", ["model.onnx", "schema.json", "example.json"])
def test_a_required_file_must_be_in_the_manifest(copy, name):
    """Otherwise the bundle would open a file that no hash protects."""
    sealed = verify(copy)
    del sealed["files"][name]
    (copy / MANIFEST).write_bytes(manifest.encoded(sealed))
    assert f"{name} is not in the manifest" in refusal(copy)


def test_equal_contents_have_the_same_identity_and_another_contract_another_one(sealed, copy):
    facts = {"seed": 0, "data_version": "c0ffee", "decision": PASSED}
    seal(copy, facts)
    assert identity_of(copy) == identity_of(sealed)
    schema = json.loads((copy / "schema.json").read_text())
    schema["inputs"][0]["contract"]["max"] = 100
    (copy / "schema.json").write_text(json.dumps(schema))
    seal(copy, facts)
    assert identity_of(copy) != identity_of(sealed)


@pytest.mark.parametrize("name", ["model.pkl", "hook.py", "lib/custom.so", "model", "weights.pt"])
def test_code_is_refused_even_if_the_manifest_lists_it(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("import os")
    seal(copy, {})
    assert f": {name} is not a file that a bundle may have;" in refusal(copy)


def test_a_link_is_refused_even_if_the_manifest_lists_it(copy, tmp_path):
    (copy / "schema.json").rename(tmp_path / "schema.json")
    (copy / "schema.json").symlink_to(tmp_path / "schema.json")
    seal(copy, {})
    assert ": schema.json is not a file that a bundle may have;" in refusal(copy)


def test_every_fault_is_named(copy):
    (copy / "model.onnx").rename(copy / "other.onnx")
    (copy / "schema.json").write_text("{}")
    message = refusal(copy)
    assert "model.onnx is missing, schema.json was changed" in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null", b'{"files": 3}', b'{"files": ["schema.json"]}']
)
def test_an_unreadable_manifest_is_named(copy, content):
    (copy / MANIFEST).write_bytes(content)
    assert f"its {MANIFEST} cannot be read" in refusal(copy)


def test_a_folder_without_a_manifest_is_refused(copy, tmp_path):
    (copy / MANIFEST).unlink()
    for path in (copy, tmp_path / "nowhere"):
        assert f"is not a bundle: it has no {MANIFEST}" in refusal(path)


def test_a_bundle_has_no_pickle(sealed):
    files = [file for file in sealed.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".onnx", ".parquet"}
    for file in files:
        head = file.read_bytes()[:2]
        assert head[:1] != b"\x80", f"{file.name} starts like a pickle"
        assert head != b"PK", f"{file.name} is an archive, as torch.save makes"
