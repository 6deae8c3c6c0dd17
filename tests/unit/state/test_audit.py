import json
import shutil
import threading

import pytest
import sqlalchemy

from app.errors import UserError
from app.state import audit as audit_module
from app.state import audit_head, database
from app.state.audit import AUDIT, Audit, Conflict
from app.state.audit_head import BrokenLog, Head


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


def test_entries_have_a_number_and_an_author(audit):
    first = audit.add("traffic", "income", {"weights": {"champion": 1.0}}, who="ann")
    second = audit.add("promote", "income", {"version": "2"})
    assert [first.number, second.number] == [1, 2]
    assert audit.entries() == [first, second]
    assert (first.who, first.action, first.details) == ("ann", "traffic", {"weights": {"champion": 1.0}})
    assert audit.entries(action="promote") == [second]
    assert audit.entries(model="flights") == []


def test_the_newest_entry_up_to_a_time_is_found(audit):
    entries = [audit.add("traffic", "income", {"n": n}) for n in range(3)]
    audit.add("traffic", "flights", {"n": 9})
    assert audit.last("income", ["traffic"]) == entries[2]
    assert audit.last("income", ["traffic"], until=entries[1].at) == entries[1]
    assert audit.last("income", ["traffic"], until=entries[0].at - 1) is None
    assert list(audit.newest_first("income", ["traffic"])) == entries[::-1]


def test_the_newest_entry_is_the_one_written_last_even_if_the_clock_went_back(audit, monkeypatch):
    for at in (100.0, 300.0, 200.0):
        monkeypatch.setattr("app.state.audit.time.time", lambda at=at: at)
        audit.add("traffic", "income", {"at": at})
    assert audit.last("income", ["traffic"]).details == {"at": 200.0}


def test_a_change_based_on_an_outdated_entry_is_a_conflict(audit):
    first = audit.add("traffic", "income", {"n": 1}, expected=0, among=["traffic"])
    audit.add("promote", "income", {})
    audit.add("traffic", "flights", {})
    second = audit.add("traffic", "income", {"n": 2}, "ann", expected=first.number, among=["traffic"])
    for expected in (0, first.number):
        with pytest.raises(Conflict, match=rf"changed meanwhile by ann \(entry {second.number}\)"):
            audit.add("traffic", "income", {"n": 3}, expected=expected, among=["traffic"])
    assert audit.last("income", ["traffic"]) == second


def test_concurrent_changes_are_not_lost(audit):
    def count(times):
        log = Audit()
        while times:
            last = log.last("income", ["count"])
            number, counted = (last.number, last.details["n"]) if last else (0, 0)
            try:
                log.add("count", "income", {"n": counted + 1}, expected=number, among=["count"])
            except Conflict:
                continue
            times -= 1
        log.close()

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
def test_a_changed_or_removed_entry_is_detected(audit, change, number):
    for n in range(4):
        audit.add("traffic", "income", {"n": n})
    assert len(audit.entries()) == 4
    tamper(change)
    with pytest.raises(BrokenLog, match=f"entry {number}$"):
        audit.entries()
    with pytest.raises(BrokenLog, match="entry"):
        list(audit.newest_first("income", ["traffic"]))


def test_concurrent_writers_do_not_break_the_chain(audit):
    def write(name):
        log = Audit()
        for n in range(10):
            log.add("traffic", name, {"n": n})
        log.close()

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


def cut_off(above):
    tamper(AUDIT.delete().where(AUDIT.c.number > above))


def test_entries_cut_off_the_end_are_detected(audit):
    for n in range(4):
        audit.add("traffic", "income", {"n": n})
    cut_off(2)
    with pytest.raises(BrokenLog, match="ends before its entry 3, but it had 4"):
        audit.entries()
    for n in range(4):  # add other entries in their place, and more
        audit.add("traffic", "income", {"n": -n})
    with pytest.raises(BrokenLog, match=r"entry 4$"):
        audit.entries()
    shutil.rmtree(audit_head.folder())
    assert len(audit.entries()) == 6, "without a stored head, the end of the log cannot be checked"


def test_the_log_is_checked_against_a_head_stored_elsewhere(audit):
    entries = [audit.add("traffic", "income", {"n": n}) for n in range(4)]
    head = Head.parse(str(Head(3, entries[2].seal)))
    assert audit.entries(expected=head) == entries
    cut_off(2)
    shutil.rmtree(audit_head.folder())
    assert len(audit.entries()) == 2
    with pytest.raises(BrokenLog, match="but it had 3"):
        audit.entries(expected=head)
    audit.add("traffic", "income", {"n": 7})
    with pytest.raises(BrokenLog, match=r"entry 3$"):
        audit.entries(expected=head)
    for text in ("3:no", f"\uff13:{entries[2].seal}"):
        with pytest.raises(UserError, match="must be NUMBER:SEAL"):
            Head.parse(text)


@pytest.mark.parametrize("damage", ["forged", "removed", "emptied", "another key"])
def test_a_changed_head_is_detected(audit, damage):
    first = audit.add("traffic", "income", {"n": 0})
    audit.add("traffic", "income", {"n": 1})
    file = audit_head.folder() / audit_head.HEAD_FILE
    if damage == "forged":
        document = json.loads(file.read_text())
        file.write_text(json.dumps({**document, "number": 1, "seal": first.seal}))
    elif damage == "removed":
        file.unlink()
    elif damage == "emptied":
        file.write_text("")
    else:
        (audit_head.folder() / audit_head.KEY_FILE).write_bytes(b"0" * 32)
    cut_off(1)
    with pytest.raises(BrokenLog, match="head of the audit log"):
        audit.entries()


def test_a_kill_between_writing_an_entry_and_its_head_does_not_break_the_log(audit, monkeypatch):
    audit.add("traffic", "income", {"n": 0})
    with monkeypatch.context() as patch:
        patch.setattr(audit_head, "store", lambda head: None)
        audit.add("traffic", "income", {"n": 1})
    assert audit_head.load().number == 1
    audit.add("traffic", "income", {"n": 2})
    assert audit_head.load().number == 3
    assert len(audit.entries()) == 3


def test_each_database_has_its_own_head(audit, tmp_path, monkeypatch):
    audit.add("traffic", "income", {"n": 0})
    audit.add("traffic", "income", {"n": 1})
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path / 'another.db'}")
    with Audit() as another:
        another.add("traffic", "income", {"n": 2})
        assert len(another.entries()) == 1
    monkeypatch.delenv("RAYLWAY_DATABASE_URL")
    assert len(audit.entries()) == 2


def test_machines_that_share_a_database_store_a_head_each(audit, tmp_path, monkeypatch):
    """Several state directories with one log, as with PostgreSQL."""
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
        assert audit_head.load().number == 6, "a reader stores the head that it read"
    assert heads == [5, 6]


def test_an_entry_is_written_even_if_its_head_cannot_be_stored(audit, monkeypatch):
    def fail(head):
        raise OSError("no space left on device")

    monkeypatch.setattr(audit_head, "store", fail)
    assert audit.add("traffic", "income", {"n": 0}).number == 1


@pytest.fixture
def since(audit):
    """The head after the third of six entries. The stored head is the sixth."""
    entries = [audit.add("traffic", "income" if n % 2 else "flights", {"n": n}) for n in range(6)]
    return Head(3, entries[2].seal)


def test_entries_since_an_entry_are_those_after_it(audit, since):
    assert [entry.number for entry in audit.entries(since=since)] == [4, 5, 6]
    assert [entry.number for entry in audit.entries("income", since=since)] == [4, 6]
    assert [entry.number for entry in audit.newest_first("income", ["traffic"], since=since)] == [6, 4]
    assert audit.entries(since=audit_head.load()) == []


def test_entries_since_an_entry_are_checked_from_it_on(audit, since, monkeypatch):
    read = []
    seal = audit_module._seal
    monkeypatch.setattr(
        audit_module,
        "_seal",
        lambda previous, values: read.append(values["number"]) or seal(previous, values),
    )
    audit.entries(since=since)
    assert read == [4, 5, 6]
    read.clear()
    assert audit.head() == audit_head.load()
    assert read == [], "the stored head is the newest entry, so no entry is read"


def test_entries_that_this_machine_has_not_checked_are_checked(audit, since):
    audit_head.store(Head(1, audit.entries()[0].seal))
    tamper(AUDIT.update().where(AUDIT.c.number == 2).values(who="eve"))
    with pytest.raises(BrokenLog, match=r"entry 2$"):
        audit.entries(since=since)
    shutil.rmtree(audit_head.folder())
    tamper(AUDIT.update().where(AUDIT.c.number == 1).values(who="eve"))
    with pytest.raises(BrokenLog, match=r"entry 1$"):
        audit.entries(since=since)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (AUDIT.update().where(AUDIT.c.number == 3).values(seal="0" * 64), r"entry 3$"),
        (AUDIT.delete().where(AUDIT.c.number == 3), r"entry 3$"),
        (AUDIT.update().where(AUDIT.c.number == 5).values(who="eve"), r"entry 5$"),
        (AUDIT.delete().where(AUDIT.c.number == 5), r"entry 5$"),
        (AUDIT.delete().where(AUDIT.c.number == 6), "ends before its entry 6, but it had 6"),
        (AUDIT.delete().where(AUDIT.c.number >= 3), "ends before its entry 3, but it had 6"),
    ],
)
def test_a_change_since_an_entry_is_detected(audit, since, change, message):
    tamper(change)
    with pytest.raises(BrokenLog, match=message):
        audit.entries(since=since)
    with pytest.raises(BrokenLog, match="entry"):
        audit.entries()
