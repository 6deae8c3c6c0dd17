import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.state import files, stages
from tests import killer


def test_the_key_depends_on_stage_inputs_and_code():
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


def test_an_input_that_is_not_a_json_value_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        stages.key("prepare", {"a": float("nan")})


def test_folders_are_in_the_state_directory(home):
    assert stages.folder("train", "k") == home / "stages" / "train" / "k"
    assert not home.exists(), "`folder` creates nothing"


def write(text: str):
    return lambda draft: (draft / "out.txt").write_text(text)


def test_a_target_is_built_once(home):
    target = stages.folder("train", "k")
    assert stages.produce(target, write("first")) is True
    assert stages.produce(target, write("second")) is False
    assert (target / "out.txt").read_text() == "first"


def test_fresh_builds_again_from_an_empty_folder(home):
    target = stages.folder("train", "k")
    stages.produce(target, lambda draft: (draft / "old.txt").touch())
    assert stages.produce(target, write("second"), fresh=True) is True
    assert [file.name for file in target.iterdir()] == ["out.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_the_previous_folder(home, error, exists):
    target = stages.folder("train", "k")
    if exists:
        stages.produce(target, write("first"))

    def fail(draft: Path) -> None:
        (draft / "half.txt").touch()
        raise error

    with pytest.raises(error):
        stages.produce(target, fail, fresh=True)
    kept = [stages.current(target) / "out.txt"] if exists else []
    assert list(target.parent.rglob("*.txt")) == kept
    assert list(target.parent.glob("[!.]*")) == ([target] if exists else [])
    assert len(list(target.parent.glob(".*"))) == len(kept), "no draft and no lock is left"


def test_the_target_does_not_exist_while_it_is_built(home):
    target = stages.folder("train", "k")

    drafts = []

    def build(draft: Path) -> None:
        assert not target.exists()
        drafts.append(draft.stat().st_ino)

    assert stages.produce(target, build)
    assert [target.stat().st_ino] == drafts, "the draft is renamed, not copied"


def test_a_reader_keeps_its_folder_while_the_target_is_built_again(home):
    target = stages.folder("train", "k")
    stages.produce(target, write("first"))
    reader = stages.current(target)
    assert reader.name == "k", "the folder has the name of its key"
    stages.produce(target, write("second"), fresh=True)
    assert (reader / "out.txt").read_text() == "first"
    assert (stages.current(target) / "out.txt").read_text() == "second"
    stages.produce(target, write("third"), fresh=True)
    assert not reader.exists(), "only the previous folder is kept"


def test_a_target_that_is_a_folder_is_used_and_can_be_built_again(home):
    target = stages.folder("train", "k")
    target.mkdir(parents=True)
    (target / "out.txt").write_text("first")
    assert stages.produce(target, write("second")) is False
    assert stages.produce(target, write("second"), fresh=True) is True
    assert (target / "out.txt").read_text() == "second"


def test_the_next_build_removes_the_drafts_of_dead_processes(home):
    target = stages.folder("train", "k")
    for other in (files.private_path(target), files.private_path(target)):
        (other / "k").mkdir(parents=True)
    neighbour = target.with_name(".k-of-another")
    neighbour.mkdir()
    stages.produce(target, write("first"))
    assert len(list(target.parent.glob(".k-*"))) == 2, "the folder itself, and one of another target"
    stages.drop(target)
    assert list(target.parent.iterdir()) == [neighbour]


def test_a_placed_folder_is_never_replaced(home):
    target = home / "bundles" / "abc"
    assert stages.place(target, write("first")) is True
    assert stages.place(target, write("second")) is False
    assert (target / "out.txt").read_text() == "first"
    assert [file.name for file in target.parent.iterdir()] == ["abc"]


def test_a_second_build_waits_for_the_first(home):
    target = stages.folder("train", "k")
    started = threading.Event()

    def slow(draft: Path) -> None:
        started.set()
        time.sleep(0.2)
        (draft / "out.txt").write_text("first")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(stages.produce, target, slow)
        started.wait()
        assert stages.produce(target, write("second")) is False
    assert first.result() is True
    assert (target / "out.txt").read_text() == "first"


def test_a_lock_whose_file_was_removed_still_excludes(home):
    """Many builds at once: each waits for a lock file that the previous holder removes."""
    target = stages.folder("train", "k")
    building = threading.Lock()

    def build(draft: Path) -> None:
        assert building.acquire(blocking=False), "two builds run at once"
        time.sleep(0.002)
        building.release()

    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda _: stages.produce(target, build, fresh=True), range(40)))
    assert built == [True] * 40
    assert len(list(target.parent.glob(".*"))) == 2, "the folder, and the previous one"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_build_leaves_the_previous_folder_or_the_new_one(home, tmp_path, fresh):
    """The build writes a folder with many files, and is killed before each of its writes."""
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
        assert killer.fork(second, killer.Watcher([home], number, private=True)) is None, (
            "the build was not killed"
        )
        assert content() in ([["first"] * 20, ["second"] * 20] if fresh else [None, ["second"] * 20])
        build("third", fresh=True)
        assert content() == ["third"] * 20
        assert len(list(target.parent.glob(".k-*"))) <= 2, "drafts of killed builds are removed"
