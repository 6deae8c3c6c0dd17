import threading

import pytest
import sqlalchemy

from app import database
from app.audit import AUDIT, Audit, Broken


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
    assert audit.last("income", "traffic") == entries[2]
    assert audit.last("income", "traffic", until=entries[1].at) == entries[1]
    assert audit.last("income", "traffic", until=entries[0].at - 1) is None


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
