"""Promotions, also killed and concurrent ones, with MLflow and SQLite."""

import threading

import pytest

from app.errors import UserError
from app.registry import connection, promotion, versions
from app.state.audit import Audit
from tests.bundles import build
from tests.promotions import Killed, kill_at
from tests.versions import registered


def test_a_promoted_challenger_is_the_champion_and_no_challenger_is_left(bundles):
    for path in bundles:
        registered("promoted", path, str(path))
    chosen = promotion.promote("promoted", versions.CHALLENGER)
    assert (chosen.number, chosen.aliases) == ("2", (versions.CHAMPION,))
    assert versions.find("promoted", versions.CHALLENGER) is None
    assert versions.resolve("promoted", "1").aliases == ()
    entries = [(entry.action, dict(entry.details)) for entry in Audit().entries("promoted")]
    assert [action for action, _ in entries] == ["register", "register", "promoting", "promote"]
    assert entries[1][1]["alias"] == versions.CHALLENGER
    assert entries[2][1] == entries[3][1] == {"version": "2", "before": "1"}
    first = promotion.promote("promoted", "1")
    assert first == versions.resolve("promoted", versions.CHAMPION)
    with pytest.raises(UserError, match="no version '7'"):
        promotion.promote("promoted", "7")
    assert versions.resolve("promoted", versions.CHAMPION).number == "1"


@pytest.fixture(scope="module")
def restore_aliases(bundles):
    """A model with a champion and a challenger; returns a function that restores both aliases."""
    for path in bundles:
        registered("cut", path, f"cut {path}")

    def reset():
        client = connection.client()
        client.set_registered_model_alias("cut", versions.CHAMPION, "1")
        client.set_registered_model_alias("cut", versions.CHALLENGER, "2")

    return reset


@pytest.mark.parametrize(
    ("write", "when", "finisher"),
    [
        ("intent", "before", "the watch"),
        ("intent", "after", "the watch"),
        ("champion", "after", "the watch"),
        ("challenger", "after", "the watch"),
        ("end", "after", "the watch"),
        ("champion", "after", "the same command"),
        ("intent", "after", "another command"),
        ("champion", "after", "another command"),
    ],
)
def test_the_next_process_finishes_a_killed_promotion(restore_aliases, write, when, finisher):
    restore_aliases()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, write, when)
        with pytest.raises(Killed):
            promotion.promote("cut", "2")
    promoted = (write, when) != ("intent", "before")
    with Audit() as audit:
        if finisher == "the same command":
            promotion.promote("cut", "2")
            promoted = True
        elif finisher == "another command":
            promotion.promote("cut", "1")
        else:
            promotion.finish(audit, "cut")
        last = audit.last("cut", promotion.PROMOTIONS)
        assert last is None or last.action == promotion.PROMOTED
        champion = versions.resolve("cut", versions.CHAMPION).number
        if finisher == "another command":
            assert (champion, last.details) == ("1", {"version": "1", "before": "2" if promoted else "1"})
        else:
            assert champion == ("2" if promoted else "1")
        challenger = versions.find("cut", versions.CHALLENGER)
        assert (challenger is None) == promoted
        audit.entries()


def test_an_interrupted_promotion_does_not_overrule_a_later_decision(restore_aliases, bundles):
    registered("cut", build(bundles[0].parent / "third", seed=3), "cut third")
    restore_aliases()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "intent", "after")
        with pytest.raises(Killed):
            promotion.promote("cut", "2")
    connection.client().set_registered_model_alias("cut", versions.CHAMPION, "3")  # as with MLflow's own page
    with Audit() as audit:
        promotion.finish(audit, "cut")
        assert audit.last("cut", promotion.PROMOTIONS).action == promotion.NOT_PROMOTED
    assert versions.resolve("cut", versions.CHAMPION).number == "3"


def test_the_last_of_concurrent_promotions_is_the_one_in_the_log(restore_aliases):
    restore_aliases()
    threads = [threading.Thread(target=promotion.promote, args=("cut", number)) for number in ("1", "2") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Audit() as audit:
        last = audit.last("cut", promotion.PROMOTIONS)
        assert last.action == promotion.PROMOTED
        assert versions.resolve("cut", versions.CHAMPION).number == last.details["version"]
        ended = [e.details for e in audit.entries("cut", promotion.PROMOTED)][-6:]
    previous = [entry["before"] for entry in ended[1:]]
    assert previous == [entry["version"] for entry in ended[:-1]]
