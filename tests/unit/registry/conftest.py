"""MLflow itself, with SQLite and files in one state directory per module."""

import pytest

from app.bundle.manifest import seal
from app.registry import flavor
from tests.bundles import PASSED, build


@pytest.fixture(scope="module", autouse=True)
def home(home_with_mlflow):
    """The state directory of a module's tests."""
    return home_with_mlflow


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """The bundles of two models, which are MLflow models too."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = [build(folder / f"seed-{seed}", seed) for seed in (0, 1)]
    for path in paths:
        flavor.write(path)
        seal(path, {"decision": PASSED})
    return paths
