import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from app.serving.replica import shadow as shadows
from app.serving.replica.shadow import Copy, Shadow, Shadows
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from tests.bundles import ROWS, schema
from tests.records import prediction


class FakeWorkers:
    """Predicts 0.5 for each row once `released` is set, or fails with `error`."""

    def __init__(self):
        self.released = asyncio.Event()
        self.error = None

    async def predict(self, columns):
        await self.released.wait()
        if self.error:
            raise self.error
        return np.full(len(columns["age"]), 0.5, dtype=np.float32)


def copy(request_id, size_bytes=100):
    return Copy(prediction(request_id, rows=ROWS[:1]), {"age": np.array([39.0])}, size_bytes)


async def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition has not become true")


def test_waiting_copies_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(shadows, "MAX_QUEUE_BYTES", 1000)

    async def run():
        workers, recorded = FakeWorkers(), []
        shadow = Shadow("new", "2", workers, schema(), recorded.append)
        for number in range(20):
            shadow.offer(copy(str(number)))
        assert shadow.num_dropped == 10
        await asyncio.sleep(0)
        shadow.offer(copy("while others are predicted", size_bytes=1))
        assert shadow.num_dropped == 11, "copies that are being predicted take memory, too"
        shadow.offer(copy("not recorded", size_bytes=0))
        assert shadow.num_dropped == 12
        workers.released.set()
        await wait_until(lambda: len(recorded) == 10)
        shadow.offer(copy("later", size_bytes=1000))
        await wait_until(lambda: len(recorded) == 11)
        assert (recorded[0].variant, recorded[0].version, recorded[0].role) == ("new", "2", "shadow")
        shadow.close()

    asyncio.run(run())


def test_waiting_copies_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(shadows, "MAX_COPIES", 3)

    async def run():
        shadow = Shadow("new", "2", FakeWorkers(), schema(), print)
        for number in range(5):
            shadow.offer(copy(str(number)))
        assert shadow.num_dropped == 2
        shadow.close()

    asyncio.run(run())


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("not foreseen"), KeyError("age")], ids=repr)
def test_a_shadow_continues_after_any_error(monkeypatch, error):
    monkeypatch.setattr(shadows, "PAUSE_S", 0.0)

    async def run():
        workers, recorded = FakeWorkers(), []
        workers.released.set()
        workers.error = error
        shadow = Shadow("new", "2", workers, schema(), recorded.append)
        shadow.offer(copy("a"))
        await wait_until(lambda: shadow.num_dropped == 1)
        workers.error = None
        shadow.offer(copy("b", size_bytes=shadows.MAX_QUEUE_BYTES))
        await wait_until(lambda: [p.request_id for p in recorded] == ["b"])
        shadow.close()

    asyncio.run(run())


def loaded(**versions):
    """A loaded traffic with a champion and these shadows."""
    variants = {"champion": DeployedVariant(version="1", weight=1, path="/nowhere")}
    for name, version in versions.items():
        variants[name] = DeployedVariant(version=version, weight=0, path="/nowhere", shadow=True)
    traffic = Traffic(salt="1", policy="weighted", variants=variants)
    return SimpleNamespace(
        traffic=traffic, workers={name: FakeWorkers() for name in versions}, schema=schema()
    )


def test_an_update_keeps_shadows_with_the_same_version_and_replaces_the_others():
    async def run():
        group = Shadows(print)
        group.update(loaded(kept="2", changed="2", removed="2"))
        before = dict(group._shadows)
        group.update(loaded(kept="2", changed="3", added="3"))
        after = group._shadows
        assert set(after) == {"kept", "changed", "added"}
        assert after["kept"] is before["kept"]
        assert after["changed"] is not before["changed"]
        await asyncio.sleep(0)
        assert [before[name]._predicting.cancelled() for name in ("kept", "changed", "removed")] == [
            False, True, True,
        ]  # fmt: skip
        group.offer(copy("not recorded", size_bytes=0))
        assert group.dropped() == {"kept": 1, "changed": 1, "added": 1}
        group.close()

    asyncio.run(run())


def test_an_endpoint_that_keeps_no_records_has_no_shadows():
    group = Shadows(None)
    group.update(loaded(new="2"))
    assert group.dropped() == {}
