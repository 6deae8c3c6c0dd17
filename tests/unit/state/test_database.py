import subprocess
import sys
import threading

import pytest
import sqlalchemy
from sqlalchemy import Column, Integer, MetaData, Table

from app.errors import UserError
from app.state import database
from app.state.audit import Audit
from app.state.database import Part


def test_threads_that_open_a_new_database_at_once_find_all_tables():
    tables = []

    def read_tables():
        with database.connect().connect() as connection:
            tables.append(sqlalchemy.inspect(connection).get_table_names())

    threads = [threading.Thread(target=read_tables) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables) == 8
    assert all(set(database.TABLES.tables) <= set(names) for names in tables)


def test_entries_survive_other_connections_that_open_and_close_the_file():
    """SQLite's locks belong to the process. If other code of the process opens and closes the file, it drops
    them; the next process that closes the database then removes the write-ahead log with its commits."""
    script = "from app.state.audit import Audit; print(len(Audit().entries()))"

    def num_entries_of_another_process() -> int:
        return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)

    with Audit() as first, Audit() as second:
        for number in range(1, 4):
            first.add("sign", "income", {})
            assert len(second.entries()) == number
            with Audit() as third:
                third.entries()
            assert num_entries_of_another_process() == number


def part(*migrations) -> Part:
    tables = MetaData()
    Table("things", tables, Column("id", Integer, primary_key=True))
    return Part("things", tables, migrations)


def test_each_migration_runs_once():
    with database.connect(part()).connect():
        pass
    calls = []
    for _ in range(2):
        with database.connect(part(lambda connection: calls.append("1 to 2"))).connect():
            pass
    assert calls == ["1 to 2"]


def test_tables_of_a_newer_version_are_refused():
    with database.connect(part(lambda connection: None)).connect():
        pass
    with (
        pytest.raises(UserError, match="things have version 2, written by a newer Raylway"),
        database.connect(part()).begin(),
    ):
        pass


def test_a_transaction_that_raises_is_rolled_back():
    things = part()
    db = database.connect(things)
    table = things.tables.tables["things"]

    def insert_twice():
        with db.begin() as connection:
            connection.execute(table.insert(), [{"id": 1}, {"id": 1}])

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        insert_twice()
    with db.connect() as connection:
        assert connection.execute(table.select()).all() == []
    db.dispose()
