import pytest
import sqlalchemy

from app.state import engine


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'x.db'}"


def test_sqlite_has_a_write_ahead_log_and_durable_commits(url):
    with engine.create(url).connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_locked_database_is_an_error_after_the_timeout(url, monkeypatch):
    monkeypatch.setattr(engine, "STATEMENT_TIMEOUT_S", 0.05)
    with engine.create(url).connect() as first, engine.create(url).connect() as second:
        first.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(sqlalchemy.exc.OperationalError, match="locked"):
            second.exec_driver_sql("BEGIN IMMEDIATE")
