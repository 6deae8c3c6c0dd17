from pathlib import Path

import pytest

from app.errors import UserError
from app.serving.traffic import cache
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from tests.traffics import place


def make_traffic(version):
    variant = DeployedVariant(version=version, weight=1, path=Path("/bundles") / version)
    return Traffic(salt="1", policy="weighted", variants={"champion": variant})


def test_the_newest_entry_of_a_model_is_loaded(home):
    assert cache.load("income") is None
    cache.store("income", 7, make_traffic("1"))
    cache.store("flights", 9, make_traffic("5"))
    cache.store("income", 12, make_traffic("2"))
    cache.store("income", 8, make_traffic("3"))  # by a replica that is late
    assert cache.load("income") == (12, make_traffic("2"), None)
    assert cache.load("flights") == (9, make_traffic("5"), None)


def test_a_file_that_cannot_be_read_is_skipped(home):
    cache.store("income", 7, make_traffic("1"))
    (home / "traffic" / "income" / f"{8:012d}.json").write_text("{")
    assert cache.load("income") == (7, make_traffic("1"), None)


def test_only_the_owner_can_read_the_cache(home):
    cache.store("income", 7, make_traffic("1"))
    folders = [home, home / "traffic", home / "traffic" / "income"]
    assert {path.stat().st_mode & 0o077 for path in [*folders, *folders[-1].iterdir()]} == {0}


def test_a_cache_that_cannot_be_written_is_no_error(home):
    home.mkdir()
    (home / "traffic").write_text("a file where the folder should be")
    cache.store("income", 7, make_traffic("1"))
    assert (home / "traffic").read_text() == "a file where the folder should be"


def test_the_cache_is_read_while_the_database_is_away(home, tmp_path, monkeypatch):
    with Audit() as audit:
        place(audit, "income", make_traffic("1"))
        newest = cache.read_with_fallback(audit, "income")
    assert (newest.traffic, newest.fault) == (make_traffic("1"), None)
    cache.store("income", newest.number, newest.traffic)
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path}/away/x.db")
    with Audit() as away:
        cached = cache.read_with_fallback(away, "income")
        assert cached[:2] == newest[:2]
        assert "the database does not answer" in cached.fault
        with pytest.raises(UserError, match="no copy of the traffic of flights"):
            cache.read_with_fallback(away, "flights")
        (tmp_path / "away").mkdir()
        with pytest.raises(UserError, match="has no traffic; deploy it with `raylway serve` first"):
            cache.read_with_fallback(away, "income")
