"""A unit test stays one: no Ray is started, and no state is written but the test's own."""

import functools
import os

import pytest


@pytest.fixture(autouse=True, scope="package")
def no_cluster():
    """The environment has nothing of a cluster that other tests of this run have joined."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("RAY_", "RAYLWAY_")):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The state directory of each test."""
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    import ray

    def refuse(*_, **__):
        raise AssertionError("a unit test must not start Ray; see tests/integration")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """`families.build` in one state directory for each family; builds each model once."""
    from tests import families  # here, because torch and MLflow take seconds that few tests need

    @functools.cache
    def folder(family: str):
        return tmp_path_factory.mktemp(f"home-{family}")

    return functools.cache(lambda family, name: families.build(family, name, folder(family)))
