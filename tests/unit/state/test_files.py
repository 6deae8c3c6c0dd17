import hashlib
import os

import pytest

from app.state import files


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_replaced_by_one_rename(tmp_path):
    file = tmp_path / "reports" / "page.html"
    files.write(file, "first")
    with file.open() as reader:
        files.write(file, b"second")
        assert reader.read() == "first", "a reader keeps the previous content"
    assert file.read_text() == "second"
    assert names(tmp_path) == ["page.html", "reports"]


def test_a_file_has_the_given_mode_or_that_of_the_umask(tmp_path):
    files.write(tmp_path / "public", "x")
    files.write(tmp_path / "secret", "x", mode=0o600)
    assert ((tmp_path / "public").stat().st_mode & 0o777) == 0o666 & ~umask()
    assert ((tmp_path / "secret").stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_target_of_an_atomic_block_appears_at_its_end(tmp_path, is_folder):
    target = tmp_path / "deep" / "target"
    with files.atomic(target) as draft:
        assert draft.parent == target.parent
        if is_folder:
            draft.mkdir()
            draft /= "file"
        draft.write_text("content")
        assert not target.exists()
    assert (target / "file" if is_folder else target).read_text() == "content"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_folder", [False, True])
def test_an_atomic_block_that_raises_leaves_nothing(tmp_path, is_folder, error):

    def write_half():
        with files.atomic(tmp_path / "target") as draft:
            if is_folder:
                draft.mkdir()
            (draft / "file" if is_folder else draft).write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == []


def test_private_paths_of_a_path_are_found_and_no_others(tmp_path):
    path = tmp_path / "x"
    private = [files.private_path(path) for _ in range(2)]
    for other in (*private, files.private_path(tmp_path / "x-y"), tmp_path / ".x-short"):
        other.touch()
    assert set(files.private_paths(path)) == set(private)


def test_a_discarded_folder_is_gone(tmp_path):
    (tmp_path / "reports" / "deep").mkdir(parents=True)
    files.discard(tmp_path / "reports")
    files.discard(tmp_path / "reports")
    assert names(tmp_path) == []


def test_remove_follows_no_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("link", "missing"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == ["folder"]
    files.remove(tmp_path / "folder")
    assert names(tmp_path) == []


def test_a_copy_has_the_sha256_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    files.copy(tmp_path / "a", tmp_path / "b")
    assert files.sha256(tmp_path / "b") == hashlib.sha256(b"content").hexdigest()


def test_a_lock_leaves_no_file(tmp_path):
    with files.locked(tmp_path / "x"):
        assert names(tmp_path) == [".x.lock"]
    assert names(tmp_path) == []
