from pathlib import Path

import pytest

from app.errors import UserError
from app.serving.traffic import cache
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import Deployed
from app.state.audit import Audit
from tests.traffics import place


def traffic(version):
    deployed = Deployed(version=version, weight=1, path=Path("/bundles") / version)
    return Traffic(salt="1", policy="weighted", variants={"champion": deployed})


def test_the_newest_entry_is_known_again(home):
    assert cache.remembered("income") is None
    cache.remember("income", 7, traffic("1"))
    cache.remember("flights", 9, traffic("5"))
    cache.remember("income", 12, traffic("2"))
    cache.remember("income", 8, traffic("3"))  # a replica that is late
    assert cache.remembered("income") == (12, traffic("2"))
    assert cache.remembered("flights") == (9, traffic("5"))


def test_a_file_that_cannot_be_read_is_passed_over(home):
    cache.remember("income", 7, traffic("1"))
    (home / "traffic" / "income" / f"{8:012d}.json").write_text("{")
    assert cache.remembered("income") == (7, traffic("1"))


def test_it_is_for_its_owner_alone(home):
    cache.remember("income", 7, traffic("1"))
    kept = [home, home / "traffic", home / "traffic" / "income"]
    assert {path.stat().st_mode & 0o077 for path in [*kept, *kept[-1].iterdir()]} == {0}


def test_a_replica_starts_while_the_database_is_away_with_what_was_loaded_last(home, tmp_path, monkeypatch):
    with Audit() as audit:
        place(audit, "income", traffic("1"))
        entry, wanted, fault = cache.first(audit, "income")
    assert (wanted, fault) == (traffic("1"), None)
    cache.remember("income", entry, wanted)
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path}/away/x.db")
    with Audit() as away:
        entry_then, wanted, fault = cache.first(away, "income")
        assert (entry_then, wanted) == (entry, traffic("1"))
        assert "the database does not answer" in fault
        with pytest.raises(UserError, match="no traffic of flights was loaded here"):
            cache.first(away, "flights")
        (tmp_path / "away").mkdir()
        with pytest.raises(UserError, match="has no traffic; say `raylway serve` first"):
            cache.first(away, "income")
