import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from app.cluster.requirements import TESTED, require_tested_versions
from app.config import Serving
from app.errors import UserError
from app.serving.replica.deployment import Replica
from app.serving.replica.workers import Worker
from app.serving.traffic.variants import DeployedVariant

ROOT = Path(__file__).parents[3]
VERSIONS = {"ray": "2.60.1", "optuna": "5.0.0"}


@pytest.fixture
def installed(monkeypatch):
    """Replaces the versions that the environment reports; None: not installed."""
    versions: dict[str, str | None] = dict(VERSIONS)

    def version(library):
        if (value := versions[library]) is None:
            raise metadata.PackageNotFoundError(library)
        return value

    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_the_installed_versions_are_the_tested_ones():
    require_tested_versions()


@pytest.mark.parametrize("version", ["2.59.1", "2.61.0", "2.6.0", "3.0.0.dev0", "2", None])
def test_another_version_of_ray_is_refused_in_one_line(installed, version):
    installed["ray"] = version
    with pytest.raises(UserError) as refused:
        require_tested_versions()
    message = str(refused.value)
    assert "ray must be version 2.60.x" in message
    assert f"but the environment has {version or 'none'}; run `make setup`" in message
    assert "\n" not in message


def test_another_version_of_optuna_is_refused(installed):
    installed["optuna"] = "5.1.0"
    with pytest.raises(UserError, match=r"optuna must be version 5\.0\.x.* has 5\.1\.0"):
        require_tested_versions()


class Local(Replica):
    """Serve awaits what `__del__` returns; Python does not."""

    def __del__(self):
        pass


def test_a_replica_does_not_start_with_another_version(installed):
    installed["ray"] = "2.61.0"
    with pytest.raises(UserError, match=r"ray must be version 2\.60\.x"):
        Local(
            "income", Serving.model_validate({"variants": {"champion": {"version": "1", "weight": 1}}}), None
        )
    with pytest.raises(UserError, match=r"ray must be version 2\.60\.x"):
        Worker("income", DeployedVariant(version="1", weight=1, path=ROOT), 32, [])


def test_pyproject_pins_the_tested_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {r.name: r.specifier for r in map(Requirement, project["dependencies"]) if r.name in TESTED}
    assert pinned.keys() == TESTED.keys()
    for library, tested in TESTED.items():
        major, minor = map(int, tested.split("."))
        assert pinned[library] == SpecifierSet(f">={tested}.0,<{major}.{minor + 1}")


def test_constraints_have_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.split("==") for line in lines if line.partition("==")[0] in TESTED)
    assert exact.keys() == TESTED.keys()
    assert all(exact[library].startswith(f"{minor}.") for library, minor in TESTED.items())


@pytest.mark.parametrize(
    ("module", "call"), [("session", "session().__enter__()"), ("local", "up()"), ("session", "main()")]
)
def test_no_cluster_starts_or_is_joined_with_another_version_of_ray(tmp_path, module, call):
    """Each way to start or join a cluster raises before it imports Ray or writes a file."""
    code = (
        "import sys\n"
        "from importlib import metadata\n"
        f"from app.cluster import {module}\n"
        "metadata.version = lambda library: '2.99.0'\n"
        "sys.argv = ['session', 'true']\n"
        "try:\n"
        f"    {module}.{call}\n"
        "except (Exception, SystemExit) as error:\n"
        "    print(error, 'ray' in sys.modules)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"RAYLWAY_HOME": str(tmp_path / "home")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert "ray must be version 2.60.x" in process.stdout
    assert process.stdout.endswith(" False\n"), "Ray must not be imported"
    assert not (tmp_path / "home").exists()
