import asyncio

import numpy as np
import pytest

from app.serving.replica import shadow
from app.serving.replica.shadow import Copy, Shadow
from tests.bundles import ROWS, schema
from tests.unit.state.test_records import prediction


class Remote:
    """Answers once it is let, or fails with `fault`."""

    def __init__(self):
        self.answers = asyncio.Event()
        self.fault = None

    async def predict(self, columns):
        await self.answers.wait()
        if self.fault:
            raise self.fault
        return np.full(len(columns["age"]), 0.5, dtype=np.float32)


def copy(request_id, size=100):
    return Copy(prediction(request_id, rows=ROWS[:1]), {"age": np.array([39.0])}, size)


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true")


def test_copies_that_wait_are_bounded_in_bytes_and_in_number(monkeypatch):
    monkeypatch.setattr(shadow, "QUEUE_BYTES", 1000)

    async def run():
        remote, recorded = Remote(), []
        hanging = Shadow("new", "2", remote, schema(), recorded.append)
        for number in range(20):
            hanging.offer(copy(str(number)))
        assert hanging.dropped == 10
        await asyncio.sleep(0)
        hanging.offer(copy("asked about", size=1))
        assert hanging.dropped == 11, "those that are asked about are in memory as well"
        hanging.offer(copy("not recorded", size=0))
        assert hanging.dropped == 12
        remote.answers.set()
        await until(lambda: len(recorded) == 10)
        hanging.offer(copy("later", size=1000))
        await until(lambda: len(recorded) == 11)
        assert [(p.variant, p.role) for p in recorded[:1]] == [("new", "shadow")]
        hanging.close()

    asyncio.run(run())


@pytest.mark.parametrize("fault", [TimeoutError(), ValueError("not foreseen"), KeyError("age")], ids=repr)
def test_a_shadow_goes_on_whatever_fails(monkeypatch, fault):
    monkeypatch.setattr(shadow, "PAUSE_S", 0.0)

    async def run():
        remote, recorded = Remote(), []
        remote.answers.set()
        remote.fault = fault
        failing = Shadow("new", "2", remote, schema(), recorded.append)
        failing.offer(copy("a"))
        await until(lambda: failing.dropped == 1)
        remote.fault = None
        failing.offer(copy("b", size=shadow.QUEUE_BYTES))
        await until(lambda: [p.request_id for p in recorded] == ["b"])
        failing.close()

    asyncio.run(run())
