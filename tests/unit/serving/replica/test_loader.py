import asyncio
from types import SimpleNamespace

import pytest

from app.errors import UserError
from app.serving.backoff import FIRST_DELAY_S
from app.serving.replica import loader
from app.serving.replica.loader import Loader
from app.serving.traffic import traffic
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from tests.traffics import place

MODEL = "income"


@pytest.fixture
def audit():
    with Audit() as audit:
        yield audit


def traffic_of(version, tmp_path):
    variants = {"champion": DeployedVariant(version=version, weight=1, path=tmp_path)}
    return Traffic(salt="1", policy="weighted", variants=variants)


class Opener:
    """Opens a traffic, or fails for the versions in `broken`."""

    def __init__(self):
        self.opened = []
        self.broken = {}

    def __call__(self, traffic, previous):
        version = traffic.variants["champion"].version
        self.opened.append((version, previous and previous.version))
        if version in self.broken:
            raise self.broken[version]
        return SimpleNamespace(version=version)


@pytest.fixture
def opener():
    return Opener()


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(loader, "Backoff", lambda: loader_backoff(lambda: now.s))
    return now


loader_backoff = loader.Backoff


def test_a_newer_traffic_is_exchanged_for_the_loaded_one(audit, opener, tmp_path):
    async def run():
        first = place(audit, MODEL, traffic_of("1", tmp_path))
        loading = Loader(MODEL, audit, opener)
        assert (loading.entry, loading.loaded.version, loading.fault) == (first, "1", None)
        assert not await loading.update(), "an unchanged entry is not opened again"
        second = place(audit, MODEL, traffic_of("2", tmp_path))
        assert await loading.update()
        assert (loading.entry, loading.loaded.version) == (second, "2")
        assert opener.opened == [("1", None), ("2", "1")], "the new traffic can reuse what was loaded"

    asyncio.run(run())


def test_without_a_traffic_that_can_be_loaded_there_is_no_loader(audit, opener, tmp_path):
    place(audit, MODEL, traffic_of("1", tmp_path))
    opener.broken["1"] = UserError("a broken bundle")
    with pytest.raises(UserError, match="a broken bundle"):
        asyncio.run(loader_of(audit, opener))


async def loader_of(audit, opener):
    return Loader(MODEL, audit, opener)


@pytest.mark.parametrize(
    ("error", "fault"),
    [(UserError("a broken bundle"), "a broken bundle"), (ValueError("x" * 900), "ValueError: " + "x" * 500)],
)
def test_a_traffic_that_cannot_be_loaded_is_a_fault_and_is_tried_again_after_a_pause(
    audit, opener, tmp_path, clock, caplog, error, fault
):
    async def run():
        first = place(audit, MODEL, traffic_of("1", tmp_path))
        loading = Loader(MODEL, audit, opener)
        place(audit, MODEL, traffic_of("2", tmp_path))
        opener.broken["2"] = error
        for _ in range(3):
            assert not await loading.update()
        assert (loading.entry, loading.loaded.version, loading.fault) == (first, "1", fault)
        assert len(opener.opened) == 2, "it is not tried again before the pause is over"
        assert len([r for r in caplog.records if "is not loaded" in r.message]) == 1, (
            "the error is logged once"
        )
        assert not await loading.update(retry_now=True)
        assert len(opener.opened) == 3
        clock.s += 2 * FIRST_DELAY_S
        del opener.broken["2"]
        assert await loading.update()
        assert (loading.loaded.version, loading.fault) == ("2", None)

    asyncio.run(run())


def test_an_audit_log_that_ends_before_the_loaded_entry_is_a_fault(audit, opener, tmp_path, monkeypatch):
    async def run():
        place(audit, MODEL, traffic_of("1", tmp_path))
        place(audit, MODEL, traffic_of("2", tmp_path))
        loading = Loader(MODEL, audit, opener)
        older = traffic.read_current(audit, MODEL)._replace(number=loading.entry - 1)
        monkeypatch.setattr(traffic, "read_current", lambda *_: older)
        assert not await loading.update()
        assert f"ends before entry {loading.entry}" in loading.fault
        assert loading.loaded.version == "2"

    asyncio.run(run())


def test_of_two_updates_at_once_one_loads(audit, opener, tmp_path):
    async def run():
        place(audit, MODEL, traffic_of("1", tmp_path))
        loading = Loader(MODEL, audit, opener)
        place(audit, MODEL, traffic_of("2", tmp_path))
        assert sorted(await asyncio.gather(loading.update(), loading.update())) == [False, True]
        assert len(opener.opened) == 2

    asyncio.run(run())
