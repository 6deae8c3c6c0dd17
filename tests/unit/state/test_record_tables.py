"""Migrations of the tables of predictions and feedback."""

import sqlite3
import threading

import pytest
import sqlalchemy

from app.errors import UserError
from app.state.records import Records
from tests.records import VERSION_1, add, check_migrated, prediction


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    records = Records()
    yield records
    records.close()


def test_the_tables_of_version_1_are_migrated(records, tmp_path):
    with sqlite3.connect(tmp_path / "production.db") as connection:
        connection.executescript(VERSION_1.format(bytes="BLOB", rows="CAST('[{\"age\": 1}]' AS BLOB)"))
    connection.close()
    others = [Records() for _ in range(4)]
    threads = [threading.Thread(target=other.predictions, args=("income",)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_migrated(records)
    for other in others:
        other.close()


def test_a_migration_that_fails_leaves_the_old_tables(records, tmp_path, monkeypatch):
    with sqlite3.connect(tmp_path / "production.db") as connection:
        connection.executescript(VERSION_1.format(bytes="BLOB", rows="CAST('[{\"age\": 1}]' AS BLOB)"))
    connection.close()
    create_all = sqlalchemy.MetaData.create_all

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(sqlalchemy.MetaData, "create_all", fail)
    with pytest.raises(RuntimeError, match="killed"):
        records.predictions("income")
    monkeypatch.setattr(sqlalchemy.MetaData, "create_all", create_all)
    check_migrated(records)


def test_tables_of_a_newer_version_are_refused(records, tmp_path):
    add(records, prediction("a"))
    with sqlite3.connect(tmp_path / "production.db") as connection:
        connection.execute("UPDATE schema_versions SET version = 9")
    connection.close()
    later = Records()
    with pytest.raises(UserError, match="version 9, written by a newer Raylway"):
        later.predictions("income")
    later.close()
