"""What writes to the registry, the audit log and files, killed before each of its writes and done again:
everything is whole, and as if it had not been killed. In processes of their own, forked."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.bundle import signature
from app.bundle.bundle import Bundle
from app.bundle.manifest import require_passed, seal, verify
from app.registry import connection, flavor, promotion, versions
from app.registry.versions import CHALLENGER, CHAMPION
from app.state.audit import Audit
from tests import killer
from tests.bundles import PASSED, build
from tests.versions import registered

NAME = "income"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    paths = [build(folder / f"seed-{seed}", seed) for seed in (0, 1)]
    for path in paths:
        flavor.write(path)
        seal(path, {"decision": PASSED})
    return paths


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    file = tmp_path_factory.mktemp("key") / "signing.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", file], check=True)
    return file


@pytest.fixture(scope="module")
def templates(tmp_path_factory, bundles):
    """State directories with none, one and two versions: the second is the challenger."""
    found = {}
    for number in range(3):
        folder = tmp_path_factory.mktemp(f"versions-{number}") / "home"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYLWAY_HOME", str(folder))

            def prepare(count: int = number) -> None:
                connection.client()
                for path in bundles[:count]:
                    registered(NAME, path, path.name)

            killer.fork(prepare)
        found[number] = folder
    return found


def state() -> dict[str, Any]:
    """All that can have changed, without times and random names. Raises if anything is not whole."""
    found: dict[str, Any] = {"versions": {}}
    for entry in versions.versions(NAME):
        version = versions.resolve(NAME, str(entry.version))
        Bundle(version.path).check_example()
        Bundle(Path(entry.source.removeprefix("file://")))
        require_passed(verify(version.path), NAME)
        signed = (version.path / signature.SIGNATURE).exists()
        found["versions"][version.number] = [version.identity, list(version.aliases), signed]
    with Audit() as audit:
        found["audit"] = [[e.action, e.details["version"], e.details.get("alias")] for e in audit.entries()]
    return found


def unkilled(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same after a kill: to promote or sign again is another entry, to register is not."""
    registered = [entry[1] for entry in found["audit"] if entry[0] == "register"]
    assert len(registered) == len(set(registered))
    return {**found, "audit": sorted({str(entry) for entry in found["audit"]})}


class Killed:
    """A command, killed before each of its writes."""

    def __init__(self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self._template = shutil.copytree(template, tmp_path / "template")
        # The registry holds absolute paths, so the state directory keeps its own.
        self.home = template
        self._log = tmp_path / "writes"
        monkeypatch.setenv("RAYLWAY_HOME", str(template))

    def each(self, command: Callable[[], Any], check: Callable[[dict[str, Any]], None] | None = None) -> int:
        """Returns how many writes there were."""
        killer.fork(command, killer.Watcher([self.home], log=self._log))
        expected = killer.fork(state)
        if check:
            check(expected)
        writes = killer.writes(self._log)
        for number in range(1, len(writes) + 1):
            self._restore()
            assert killer.fork(command, killer.Watcher([self.home], number)) is None, "it was not killed"
            found = killer.fork(lambda: (command(), state())[1])
            assert unkilled(found) == unkilled(expected), f"killed before {writes[number - 1]}"
        self._restore()
        return len(writes)

    def _restore(self) -> None:
        shutil.rmtree(self.home)
        shutil.copytree(self._template, self.home, symlinks=True)


@pytest.fixture
def killed(templates, tmp_path, monkeypatch):
    return lambda number: Killed(templates[number], tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_first_registration(killed, bundles):
    def check(found: dict[str, Any]) -> None:
        ((_, aliases, _),) = found["versions"].values()
        assert aliases == [CHAMPION]

    assert killed(0).each(lambda: registered(NAME, bundles[0]).number, check) >= 8


@pytest.mark.slow
def test_the_registration_of_a_challenger(killed, bundles):
    def check(found: dict[str, Any]) -> None:
        assert [v[1] for v in found["versions"].values()] == [[CHALLENGER], [CHAMPION]]

    assert killed(1).each(lambda: registered(NAME, bundles[1], "second").number, check) >= 6


def test_promote(killed):
    assert killed(2).each(lambda: promotion.promote(NAME, "2").number) >= 2


def test_sign(killed, key):
    def check(found: dict[str, Any]) -> None:
        assert [v[2] for v in found["versions"].values()] == [False, True]

    assert killed(2).each(lambda: versions.sign(NAME, CHAMPION, key).number, check) >= 2
