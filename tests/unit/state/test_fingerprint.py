import pytest

from app.state import fingerprint
from app.state.fingerprint import dependencies


def test_a_module_needs_what_it_imports_at_its_top_or_in_a_function_and_the_packages_of_both():
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


def test_libraries_that_shape_a_result_are_named_by_release():
    found = fingerprint.fingerprint("app.data.prepare")
    libraries = {name for name in found if not name.startswith("app")}
    assert libraries == {"numpy", "pandas", "pyarrow", "tokenizers"}
    assert found["numpy"].count(".") == 2
    assert fingerprint.fingerprint("app.training.loop")["torch"] == "2.13.0", "without the build's +cpu"
    assert fingerprint.fingerprint("app.tasks.tabular.baselines")["sklearn"].count(".") == 2


def test_a_module_of_nobody_is_refused():
    for name in ("app.nobody", "json", "application"):
        with pytest.raises(ValueError, match=f"{name} must be a module of app"):
            dependencies(name)
