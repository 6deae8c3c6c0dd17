"""Kill commands that write to the registry, the audit log and files before each of their writes, in a forked
process, and run them again: the state is complete, as if they had not been killed."""

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
    """State directories by their number of versions, 0 to 2; the second version is the challenger."""
    folders = {}
    for number in range(3):
        folder = tmp_path_factory.mktemp(f"versions-{number}") / "home"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYLWAY_HOME", str(folder))

            def prepare(count: int = number) -> None:
                connection.client()
                for path in bundles[:count]:
                    registered(NAME, path, path.name)

            killer.fork(prepare)
        folders[number] = folder
    return folders


def state() -> dict[str, Any]:
    """All state that may have changed, without times and random names. Raises if any of it is incomplete."""
    current: dict[str, Any] = {"versions": {}}
    for entry in versions.versions(NAME):
        version = versions.resolve(NAME, str(entry.version))
        Bundle(version.path).check_example()
        Bundle(Path(entry.source.removeprefix("file://")))
        require_passed(verify(version.path), NAME)
        signed = (version.path / signature.SIGNATURE).exists()
        current["versions"][version.number] = [version.identity, list(version.aliases), signed]
    with Audit() as audit:
        current["audit"] = [[e.action, e.details["version"], e.details.get("alias")] for e in audit.entries()]
    return current


def without_repetitions(current: dict[str, Any]) -> dict[str, Any]:
    """The part of the state that a kill must not change: promoting or signing again adds an entry,
    registering does not."""
    registered = [entry[1] for entry in current["audit"] if entry[0] == "register"]
    assert len(registered) == len(set(registered))
    return {**current, "audit": sorted({str(entry) for entry in current["audit"]})}


class Killed:
    """Runs a command and kills it before each of its writes."""

    def __init__(self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self._template = shutil.copytree(template, tmp_path / "template")
        # The registry stores absolute paths, so the state directory must keep its path.
        self.home = template
        self._log = tmp_path / "writes"
        monkeypatch.setenv("RAYLWAY_HOME", str(template))

    def kill_at_each_write(
        self, command: Callable[[], Any], check: Callable[[dict[str, Any]], None] | None = None
    ) -> int:
        """Returns the number of writes."""
        killer.fork(command, killer.Watcher([self.home], log=self._log))
        expected = killer.fork(state)
        if check:
            check(expected)
        writes = killer.writes(self._log)
        for number in range(1, len(writes) + 1):
            self._restore()
            assert killer.fork(command, killer.Watcher([self.home], number)) is None, (
                "the command was not killed"
            )
            current = killer.fork(lambda: (command(), state())[1])
            assert without_repetitions(current) == without_repetitions(expected), (
                f"killed before {writes[number - 1]}"
            )
        self._restore()
        return len(writes)

    def _restore(self) -> None:
        shutil.rmtree(self.home)
        shutil.copytree(self._template, self.home, symlinks=True)


@pytest.fixture
def killed(templates, tmp_path, monkeypatch):
    return lambda number: Killed(templates[number], tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_killed_first_registration_completes_when_it_is_repeated(killed, bundles):
    def check(current: dict[str, Any]) -> None:
        ((_, aliases, _),) = current["versions"].values()
        assert aliases == [CHAMPION]

    assert killed(0).kill_at_each_write(lambda: registered(NAME, bundles[0]).number, check) >= 8


@pytest.mark.slow
def test_a_killed_registration_of_a_challenger_completes_when_it_is_repeated(killed, bundles):
    def check(current: dict[str, Any]) -> None:
        assert [v[1] for v in current["versions"].values()] == [[CHALLENGER], [CHAMPION]]

    assert killed(1).kill_at_each_write(lambda: registered(NAME, bundles[1], "second").number, check) >= 6


def test_a_killed_promote_completes_when_it_is_repeated(killed):
    assert killed(2).kill_at_each_write(lambda: promotion.promote(NAME, "2").number) >= 2


def test_a_killed_sign_completes_when_it_is_repeated(killed, key):
    def check(current: dict[str, Any]) -> None:
        assert [v[2] for v in current["versions"].values()] == [False, True]

    assert killed(2).kill_at_each_write(lambda: versions.sign(NAME, CHAMPION, key).number, check) >= 2
