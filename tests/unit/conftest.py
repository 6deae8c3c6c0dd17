"""Unit tests do not start Ray, and write to their own state directory only."""

import functools
import os
import shutil

import pytest


@pytest.fixture(autouse=True, scope="package")
def no_cluster():
    """Remove the environment variables of a cluster that other tests of this run have joined."""
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
    """Make `ray.init` raise an error."""
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


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory):
    """A file with MLflow's tables, which take seconds to create."""
    from app.registry import connection

    home = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(home))
        patch.delenv("RAYLWAY_DATABASE_URL", raising=False)
        connection.client()
    return home / "mlflow.db"


@pytest.fixture(scope="module")
def home_with_mlflow(tmp_path_factory, mlflow_tables):
    """A state directory with MLflow's tables, for all tests of a module."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(mlflow_tables, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(home))
        for name in ("RAYLWAY_DATABASE_URL", "RAYLWAY_STORE"):
            patch.delenv(name, raising=False)
        yield home
