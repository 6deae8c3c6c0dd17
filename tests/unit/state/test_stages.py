import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.errors import UserError
from app.state import files, stages
from tests import killer


def test_the_key_depends_on_the_stage_the_inputs_and_the_code():
    first = stages.key("prepare", {"a": 1, "b": [1, 2]}, "app.state.files")
    assert stages.key("prepare", {"b": [1, 2], "a": 1}, "app.state.files") == first
    others = [
        stages.key("train", {"a": 1, "b": [1, 2]}, "app.state.files"),
        stages.key("prepare", {"a": 2, "b": [1, 2]}, "app.state.files"),
        stages.key("prepare", {"a": 1, "b": [2, 1]}, "app.state.files"),
        stages.key("prepare", {"a": 1}, "app.state.files"),
        stages.key("prepare", {"a": 1, "b": [1, 2]}),
        stages.key("prepare", {"a": 1, "b": [1, 2]}, "app.errors"),
    ]
    assert len({first, *others}) == 7
    assert all(key.isalnum() for key in others)


def test_an_input_that_is_no_json_value_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        stages.key("prepare", {"a": float("nan")})


def test_folders_are_in_the_state_directory(home):
    assert stages.folder("train", "k") == home / "stages" / "train" / "k"
    assert not home.exists(), "asking makes nothing"


def write(text: str):
    return lambda draft: (draft / "out.txt").write_text(text)


def test_is_built_once(home):
    target = stages.folder("train", "k")
    assert stages.produce(target, write("first")) is True
    assert stages.produce(target, write("second")) is False
    assert (target / "out.txt").read_text() == "first"


def test_fresh_builds_again_and_leaves_nothing_of_before(home):
    target = stages.folder("train", "k")
    stages.produce(target, lambda draft: (draft / "old.txt").touch())
    assert stages.produce(target, write("second"), fresh=True) is True
    assert [file.name for file in target.iterdir()] == ["out.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_what_was_there(home, error, before):
    target = stages.folder("train", "k")
    if before:
        stages.produce(target, write("first"))

    def fail(draft: Path) -> None:
        (draft / "half.txt").touch()
        raise error

    with pytest.raises(error):
        stages.produce(target, fail, fresh=True)
    kept = [stages.current(target) / "out.txt"] if before else []
    assert list(target.parent.rglob("*.txt")) == kept
    assert list(target.parent.glob("[!.]*")) == ([target] if before else [])
    assert len(list(target.parent.glob(".*"))) == len(kept), "neither a draft nor a lock"


def test_nothing_is_at_the_target_while_it_is_built(home):
    target = stages.folder("train", "k")

    drafts = []

    def build(draft: Path) -> None:
        assert not target.exists()
        drafts.append(draft.stat().st_ino)

    assert stages.produce(target, build)
    assert [target.stat().st_ino] == drafts, "put in place by one rename, not copied file by file"


def test_who_reads_while_it_is_built_again_reads_on_from_what_was_there(home):
    target = stages.folder("train", "k")
    stages.produce(target, write("first"))
    reader = stages.current(target)
    assert reader.name == "k", "a folder says which key it is of"
    stages.produce(target, write("second"), fresh=True)
    assert (reader / "out.txt").read_text() == "first"
    assert (stages.current(target) / "out.txt").read_text() == "second"
    stages.produce(target, write("third"), fresh=True)
    assert not reader.exists(), "only the one before is kept"


def test_a_folder_from_before_targets_were_links_is_used_and_can_be_built_again(home):
    target = stages.folder("train", "k")
    target.mkdir(parents=True)
    (target / "out.txt").write_text("first")
    assert stages.produce(target, write("second")) is False
    assert stages.produce(target, write("second"), fresh=True) is True
    assert (target / "out.txt").read_text() == "second"


def test_what_the_dead_have_left_is_removed_by_the_next_who_builds(home):
    target = stages.folder("train", "k")
    for other in (files.private_path(target), files.private_path(target)):
        (other / "k").mkdir(parents=True)
    neighbour = target.with_name(".k-of-another")
    neighbour.mkdir()
    stages.produce(target, write("first"))
    assert len(list(target.parent.glob(".k-*"))) == 2, "the folder itself, and one of another name"
    stages.drop(target)
    assert list(target.parent.iterdir()) == [neighbour]


def test_what_is_placed_stays_as_it_is(home):
    target = home / "bundles" / "abc"
    assert stages.place(target, write("first")) is True
    assert stages.place(target, write("second")) is False
    assert (target / "out.txt").read_text() == "first"
    assert [file.name for file in target.parent.iterdir()] == ["abc"]


def test_of_two_that_build_the_same_one_waits_for_the_other(home):
    target = stages.folder("train", "k")
    begun = threading.Event()

    def slow(draft: Path) -> None:
        begun.set()
        time.sleep(0.2)
        (draft / "out.txt").write_text("of the first")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(stages.produce, target, slow)
        begun.wait()
        assert stages.produce(target, write("of the second")) is False
    assert first.result() is True
    assert (target / "out.txt").read_text() == "of the first"


def test_a_lock_that_was_taken_away_while_waited_for_locks_nobody_out(home):
    """Many at once: each waits on the lock's file of the one before, which is gone when its turn comes."""
    target = stages.folder("train", "k")
    building = threading.Lock()

    def build(draft: Path) -> None:
        assert building.acquire(blocking=False), "two build at once"
        time.sleep(0.002)
        building.release()

    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda _: stages.produce(target, build, fresh=True), range(40)))
    assert built == [True] * 40
    assert len(list(target.parent.glob(".*"))) == 2, "the folder, and the one before"


def test_all_nodes_must_see_the_state_and_share_a_database(home, tmp_path, monkeypatch):
    output = tmp_path / "answers"

    def require(*nodes: str, blind_to: Path | None = None) -> None:
        def seen_by(file: Path) -> dict[str, bool]:
            return {node: file.parent != blind_to or node == nodes[0] for node in nodes}

        stages.require_shared(output, seen_by=seen_by)

    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    require("10.0.0.1")
    with pytest.raises(UserError, match="has 2 nodes, which must share a database: set RAYLWAY_DATABASE_URL"):
        require("10.0.0.1", "10.0.0.2")
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", "postgresql://somewhere/raylway")
    require("10.0.0.1", "10.0.0.2")
    with pytest.raises(UserError, match=r"state directory .*10\.0\.0\.2 does not; put RAYLWAY_HOME on"):
        require("10.0.0.1", "10.0.0.2", blind_to=home)
    with pytest.raises(UserError, match=r"see .*answers, but 10\.0\.0\.2 does not; put it on"):
        require("10.0.0.1", "10.0.0.2", blind_to=output)


def test_a_file_is_written_by_one_rename_and_a_folder_is_gone_at_once(tmp_path):
    file = tmp_path / "reports" / "page.html"
    files.write(file, "first")
    with file.open() as reader:
        files.write(file, b"second")
        assert reader.read() == "first", "who reads it goes on with what was there"
    assert file.read_text() == "second"
    assert (file.stat().st_mode & 0o777) == 0o666 & ~umask()
    files.write(tmp_path / "secret", "x", mode=0o600)
    assert ((tmp_path / "secret").stat().st_mode & 0o777) == 0o600
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["page.html", "reports", "secret"]
    files.discard(tmp_path / "reports")
    files.discard(tmp_path / "reports")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("fresh", [False, True])
def test_a_build_that_is_killed_leaves_the_folder_of_before_or_the_new_one(home, tmp_path, fresh):
    """Before each of its writes, of a folder with many files."""
    target = stages.folder("train", "k")

    def build(text: str, fresh: bool) -> None:
        def fill(draft: Path) -> None:
            for number in range(20):
                (draft / f"{number}.txt").write_text(text)

        stages.produce(target, fill, fresh=fresh)

    def content() -> list[str] | None:
        return sorted(file.read_text() for file in target.iterdir()) if target.exists() else None

    log = tmp_path / "writes"
    if fresh:
        build("first", fresh=False)
    second = functools.partial(build, "second", fresh)
    killer.fork(second, killer.Watcher([home], log=log, private=True))
    assert content() == ["second"] * 20
    count = len(killer.writes(log))
    assert count > 20
    for number in range(1, count + 1):
        stages.drop(target)
        if fresh:
            build("first", fresh=False)
        assert killer.fork(second, killer.Watcher([home], number, private=True)) is None, "not killed"
        assert content() in ([["first"] * 20, ["second"] * 20] if fresh else [None, ["second"] * 20])
        build("third", fresh=True)
        assert content() == ["third"] * 20
        assert len(list(target.parent.glob(".k-*"))) <= 2, "what was left is removed"
