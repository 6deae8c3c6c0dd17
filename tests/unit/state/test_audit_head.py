import shutil

import pytest

from app.errors import UserError
from app.state import audit_head
from app.state.audit_head import BrokenLog, Head
from tests import killer


@pytest.mark.parametrize("head", [Head(1, "a" * 64), Head(10**17, "0123456789abcdef" * 4)])
def test_a_head_is_parsed_from_its_text(head):
    assert Head.parse(f" {head}\n") == head


@pytest.mark.parametrize("text", ["", "3", "0:" + "a" * 64, "3:no", "\uff13:" + "a" * 64, "3:" + "A" * 64])
def test_an_invalid_text_of_a_head_is_refused(text):
    with pytest.raises(UserError, match="must be NUMBER:SEAL"):
        Head.parse(text)


def test_a_stored_head_is_loaded_until_it_is_changed(home):
    assert audit_head.load() is None
    for head in (Head(1, "a" * 64), Head(2, "b" * 64)):
        audit_head.store(head)
        assert audit_head.load() == head
    assert {file.stat().st_mode & 0o777 for file in audit_head.folder().iterdir()} == {0o600}
    (audit_head.folder() / audit_head.HEAD_FILE).unlink()
    with pytest.raises(BrokenLog, match="head of the audit log"):
        audit_head.load()


@pytest.mark.parametrize("previous", [None, Head(1, "a" * 64)])
def test_the_next_writer_of_the_head_removes_the_drafts_of_a_killed_one(home, tmp_path, previous):
    head, log = Head(2, "b" * 64), tmp_path / "writes"

    def store_and_kill(number=0):
        shutil.rmtree(home, ignore_errors=True)
        if previous is not None:
            audit_head.store(previous)
        watcher = killer.Watcher([home], number, log if number == 0 else None, private=True)
        return killer.fork(lambda: audit_head.store(head) or "stored", watcher)

    assert store_and_kill() == "stored"
    writes = killer.writes(log)
    assert len(writes) >= 2
    for number in range(1, len(writes) + 1):
        assert store_and_kill(number) is None, "the writer was not killed"
        audit_head.store(head)
        drafts = [path for path in (home / "audit").rglob("*") if path.name.startswith(".")]
        assert drafts == [], f"killed before {writes[number - 1]}"
        assert audit_head.load() == head
