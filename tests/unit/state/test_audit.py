import json
import shutil
import threading

import pytest
import sqlalchemy

from app.errors import UserError
from app.state import audit as audit_module
from app.state import audit_head, database
from app.state.audit import AUDIT, Audit, Changed
from app.state.audit_head import Broken, Head
from tests import killer


@pytest.fixture
def audit(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    audit = Audit()
    yield audit
    audit.close()


def tamper(statement):
    with database.connect().begin() as connection:
        connection.execute(statement)


def test_entries_are_numbered_and_say_who_did_what(audit):
    first = audit.add("traffic", "income", {"weights": {"champion": 1.0}}, who="ann")
    second = audit.add("promote", "income", {"version": "2"})
    assert [first.number, second.number] == [1, 2]
    assert audit.entries() == [first, second]
    assert (first.who, first.action, first.details) == ("ann", "traffic", {"weights": {"champion": 1.0}})
    assert audit.entries(action="promote") == [second]
    assert audit.entries(model="flights") == []


def test_what_held_at_a_time(audit):
    entries = [audit.add("traffic", "income", {"n": n}) for n in range(3)]
    audit.add("traffic", "flights", {"n": 9})
    assert audit.last("income", ["traffic"]) == entries[2]
    assert audit.last("income", ["traffic"], until=entries[1].at) == entries[1]
    assert audit.last("income", ["traffic"], until=entries[0].at - 1) is None
    assert list(audit.backwards("income", ["traffic"])) == entries[::-1]


def test_the_newest_is_the_one_written_last_whatever_the_clock_says(audit, monkeypatch):
    for at in (100.0, 300.0, 200.0):
        monkeypatch.setattr("app.state.audit.time.time", lambda at=at: at)
        audit.add("traffic", "income", {"at": at})
    assert audit.last("income", ["traffic"]).details == {"at": 200.0}


def test_a_change_of_what_does_not_hold_any_more_is_refused(audit):
    first = audit.add("traffic", "income", {"n": 1}, expected=0, among=["traffic"])
    audit.add("promote", "income", {})
    audit.add("traffic", "flights", {})
    second = audit.add("traffic", "income", {"n": 2}, "ann", expected=first.number, among=["traffic"])
    for expected in (0, first.number):
        with pytest.raises(Changed, match=rf"changed meanwhile by ann \(entry {second.number}\)"):
            audit.add("traffic", "income", {"n": 3}, expected=expected, among=["traffic"])
    assert audit.last("income", ["traffic"]) == second


def test_of_many_who_change_the_same_at_once_nobodys_change_is_lost(audit):
    def count(times):
        mine = Audit()
        while times:
            last = mine.last("income", ["count"])
            number, counted = (last.number, last.details["n"]) if last else (0, 0)
            try:
                mine.add("count", "income", {"n": counted + 1}, expected=number, among=["count"])
            except Changed:
                continue
            times -= 1
        mine.close()

    threads = [threading.Thread(target=count, args=(10,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.last("income", ["count"]).details == {"n": 40}


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (AUDIT.update().where(AUDIT.c.number == 2).values(who="eve"), 2),
        (AUDIT.update().where(AUDIT.c.number == 1).values(details='{"n": 7}'), 1),
        (AUDIT.update().where(AUDIT.c.number == 3).values(at=0.0), 3),
        (AUDIT.delete().where(AUDIT.c.number == 2), 2),
        (AUDIT.delete().where(AUDIT.c.number == 1), 1),
    ],
)
def test_a_change_to_what_was_written_shows(audit, change, number):
    for n in range(4):
        audit.add("traffic", "income", {"n": n})
    assert len(audit.entries()) == 4
    tamper(change)
    with pytest.raises(Broken, match=f"entry {number}$"):
        audit.entries()
    with pytest.raises(Broken, match="entry"):
        list(audit.backwards("income", ["traffic"]))


def test_those_who_write_at_the_same_time_do_not_break_the_chain(audit):
    def write(name):
        mine = Audit()
        for n in range(10):
            mine.add("traffic", name, {"n": n})
        mine.close()

    threads = [threading.Thread(target=write, args=(f"m{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.number for entry in audit.entries()] == list(range(1, 41))
    with database.connect().connect() as connection:
        assert (
            connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(AUDIT)).scalar() == 40
        )


def cut(audit, above):
    tamper(AUDIT.delete().where(AUDIT.c.number > above))


def test_entries_cut_off_the_end_show(audit):
    for n in range(4):
        audit.add("traffic", "income", {"n": n})
    cut(audit, 2)
    with pytest.raises(Broken, match="ends before its entry 3, but it had 4"):
        audit.entries()
    for n in range(4):  # others in their place, and more
        audit.add("traffic", "income", {"n": -n})
    with pytest.raises(Broken, match=r"entry 4$"):
        audit.entries()
    shutil.rmtree(audit_head.folder())
    assert len(audit.entries()) == 6, "the log is trusted as it is"


def test_a_head_that_was_kept_elsewhere_is_held_against_the_log(audit):
    entries = [audit.add("traffic", "income", {"n": n}) for n in range(4)]
    kept = Head.parse(str(Head(3, entries[2].seal)))
    assert audit.entries(expected=kept) == entries
    cut(audit, 2)
    shutil.rmtree(audit_head.folder())
    assert len(audit.entries()) == 2
    with pytest.raises(Broken, match="but it had 3"):
        audit.entries(expected=kept)
    audit.add("traffic", "income", {"n": 7})
    with pytest.raises(Broken, match=r"entry 3$"):
        audit.entries(expected=kept)
    for text in ("3:no", f"\uff13:{entries[2].seal}"):
        with pytest.raises(UserError, match="must be NUMBER:SEAL"):
            Head.parse(text)


@pytest.mark.parametrize("damage", ["forged", "removed", "emptied", "another key"])
def test_a_head_that_was_changed_shows(audit, damage):
    first = audit.add("traffic", "income", {"n": 0})
    audit.add("traffic", "income", {"n": 1})
    file = audit_head.folder() / audit_head.FILE
    if damage == "forged":
        document = json.loads(file.read_text())
        file.write_text(json.dumps({**document, "number": 1, "seal": first.seal}))
    elif damage == "removed":
        file.unlink()
    elif damage == "emptied":
        file.write_text("")
    else:
        (audit_head.folder() / audit_head.KEY).write_bytes(b"0" * 32)
    cut(audit, 1)
    with pytest.raises(Broken, match="head of the audit log"):
        audit.entries()


def test_a_kill_between_an_entry_and_the_head_is_no_fault(audit, monkeypatch):
    audit.add("traffic", "income", {"n": 0})
    with monkeypatch.context() as patch:
        patch.setattr(audit_head, "keep", lambda head: None)
        audit.add("traffic", "income", {"n": 1})
    assert audit_head.load().number == 1
    audit.add("traffic", "income", {"n": 2})
    assert audit_head.load().number == 3
    assert len(audit.entries()) == 3


def test_each_database_has_a_head_of_its_own(audit, tmp_path, monkeypatch):
    audit.add("traffic", "income", {"n": 0})
    audit.add("traffic", "income", {"n": 1})
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path / 'another.db'}")
    with Audit() as another:
        another.add("traffic", "income", {"n": 2})
        assert len(another.entries()) == 1
    monkeypatch.delenv("RAYLWAY_DATABASE_URL")
    assert len(audit.entries()) == 2


def test_several_machines_with_one_database_each_keep_a_head(audit, tmp_path, monkeypatch):
    """As with PostgreSQL: the log is one, the state directories are not."""
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path / 'production.db'}")
    for n in range(3):
        for machine in ("one", "two"):
            monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / machine))
            audit.add("traffic", "income", {"n": n})
    heads = []
    for machine in ("one", "two"):
        monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / machine))
        heads.append(audit_head.load().number)
        assert len(audit.entries()) == 6
        assert audit_head.load().number == 6, "who reads keeps what was read"
    assert heads == [5, 6]


def test_a_head_that_cannot_be_written_keeps_nobody_from_working(audit, monkeypatch):
    def full(head):
        raise OSError("no space left on device")

    monkeypatch.setattr(audit_head, "keep", full)
    assert audit.add("traffic", "income", {"n": 0}).number == 1


@pytest.mark.parametrize("kept", [None, Head(1, "a" * 64)])
def test_what_a_writer_of_the_head_left_when_it_was_killed_is_removed_by_the_next(home, tmp_path, kept):
    head, log = Head(2, "b" * 64), tmp_path / "writes"

    def watched(number=0):
        shutil.rmtree(home, ignore_errors=True)
        if kept is not None:
            audit_head.keep(kept)
        watcher = killer.Watcher([home], number, log if number == 0 else None, private=True)
        return killer.fork(lambda: audit_head.keep(head) or "kept", watcher)

    assert watched() == "kept"
    writes = killer.writes(log)
    assert len(writes) >= 2
    for number in range(1, len(writes) + 1):
        assert watched(number) is None, "it was not killed"
        audit_head.keep(head)
        left = [path for path in (home / "audit").rglob("*") if path.name.startswith(".")]
        assert left == [], f"killed before {writes[number - 1]}"
        assert audit_head.load() == head


@pytest.fixture
def since(audit):
    """The third of six entries. The head that is kept is the sixth."""
    entries = [audit.add("traffic", "income" if n % 2 else "flights", {"n": n}) for n in range(6)]
    return Head(3, entries[2].seal)


def test_entries_since_one_are_those_after_it(audit, since):
    assert [entry.number for entry in audit.entries(since=since)] == [4, 5, 6]
    assert [entry.number for entry in audit.entries("income", since=since)] == [4, 6]
    assert [entry.number for entry in audit.backwards("income", ["traffic"], since=since)] == [6, 4]
    assert audit.entries(since=audit_head.load()) == []


def test_entries_since_one_are_read_from_it_on(audit, since, monkeypatch):
    read = []
    seal = audit_module._seal
    monkeypatch.setattr(audit_module, "_seal", lambda *of: read.append(of[1]["number"]) or seal(*of))
    audit.entries(since=since)
    assert read == [4, 5, 6]
    read.clear()
    assert audit.head() == audit_head.load()
    assert read == [], "the head that was kept is the newest"


def test_what_this_machine_has_not_checked_yet_is_read_too(audit, since):
    audit_head.keep(Head(1, audit.entries()[0].seal))
    tamper(AUDIT.update().where(AUDIT.c.number == 2).values(who="eve"))
    with pytest.raises(Broken, match=r"entry 2$"):
        audit.entries(since=since)
    shutil.rmtree(audit_head.folder())
    tamper(AUDIT.update().where(AUDIT.c.number == 1).values(who="eve"))
    with pytest.raises(Broken, match=r"entry 1$"):
        audit.entries(since=since)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (AUDIT.update().where(AUDIT.c.number == 3).values(seal="0" * 64), r"entry 3$"),
        (AUDIT.delete().where(AUDIT.c.number == 3), r"entry 3$"),
        (AUDIT.update().where(AUDIT.c.number == 5).values(who="eve"), r"entry 5$"),
        (AUDIT.delete().where(AUDIT.c.number == 5), r"entry 5$"),
        (AUDIT.delete().where(AUDIT.c.number == 6), "ends before its entry 6, but it had 6"),
        (AUDIT.delete().where(AUDIT.c.number >= 3), "ends before its entry 3, but it had 6"),
    ],
)
def test_a_change_to_what_was_written_since_one_shows(audit, since, change, says):
    tamper(change)
    with pytest.raises(Broken, match=says):
        audit.entries(since=since)
    with pytest.raises(Broken, match="entry"):
        audit.entries()
