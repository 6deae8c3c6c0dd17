import pytest

from app.state import fingerprint
from app.state.fingerprint import dependencies


def test_dependencies_are_imports_anywhere_in_a_module_and_their_packages():
    modules, _ = dependencies("app.state.stages")
    assert modules == {
        "app",
        "app.errors",
        "app.state",
        "app.state.files",
        "app.state.fingerprint",
        "app.state.home",
        "app.state.stages",
    }


def test_a_fingerprint_has_the_releases_of_libraries():
    hashes = fingerprint.fingerprint("app.data.prepare")
    libraries = {name for name in hashes if not name.startswith("app")}
    assert libraries == {"numpy", "pandas", "pyarrow", "tokenizers"}
    assert hashes["numpy"].count(".") == 2
    assert fingerprint.fingerprint("app.training.loop")["torch"] == "2.13.0", "without the build's +cpu"
    assert fingerprint.fingerprint("app.tasks.tabular.baselines")["sklearn"].count(".") == 2


def test_a_module_outside_the_application_is_refused():
    for name in ("app.nobody", "json", "application"):
        with pytest.raises(ValueError, match=f"{name} must be a module of app"):
            dependencies(name)


def test_a_changed_data_file_changes_the_fingerprint_of_its_package_only(tmp_path, monkeypatch):
    for name, content in (
        ("app/__init__.py", ""),
        ("app/sql/__init__.py", ""),
        ("app/sql/a.sql", "SELECT 1"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    hashes = []
    for content in ("SELECT 1", "SELECT 2"):
        (tmp_path / "app/sql/a.sql").write_text(content)
        for cached in (fingerprint._source, fingerprint._code, fingerprint._imports):
            cached.cache_clear()
        hashes.append(fingerprint.fingerprint("app.sql"))
    for cached in (fingerprint._source, fingerprint._code, fingerprint._imports):
        cached.cache_clear()
    assert hashes[0]["app.sql"] != hashes[1]["app.sql"]
    assert hashes[0]["app"] == hashes[1]["app"]
