import asyncio
import gc
import sys

import pytest

from app.config import Serving
from app.serving.gateway import guard
from app.serving.replica import autoscaling, deployment
from app.serving.replica.deployment import Replica
from app.serving.traffic import traffic
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from tests.bundles import build
from tests.records import prediction

SERVING = Serving.model_validate({"variants": {"champion": {"version": "1", "weight": 1}}})


class Local(Replica):
    """Serve awaits what `__del__` returns; Python would not."""

    close = Replica.__del__

    def __del__(self):
        pass


@pytest.fixture(autouse=True)
def process_settings():
    """A replica sets these values for its own process."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)
    gc.unfreeze()


def test_a_replica_reports_hooks_without_effect_and_logs_them_once(home, tmp_path, monkeypatch, caplog):
    path, now = guard.DirectPath(), [0.0]
    for module in (guard, deployment):
        monkeypatch.setattr(module, "DIRECT_PATH", path)
    monkeypatch.setattr(deployment, "ThreadLoad", lambda: autoscaling.ThreadLoad(lambda: now[0]))
    monkeypatch.setattr(deployment, "UPDATE_S", 0.01)
    deployed = DeployedVariant(version="1", weight=1, path=build(tmp_path / "1", seed=1))
    served = Traffic(salt="1", policy="weighted", variants={"champion": deployed})
    with Audit() as audit, traffic.set_with_rollback(audit, "income", served, SERVING):
        pass

    async def run():
        replica = Local("income", SERVING, None)
        (unguarded,) = replica.state().hook_faults
        assert "has not called app.serving.gateway.guard.middlewares" in unguarded
        guard.middlewares()
        assert replica.state().hook_faults == []
        now[0] = autoscaling.MAX_INTERVAL_S
        (not_read,) = replica.state().hook_faults
        assert "has not read the replica's load for 30 s" in not_read
        while not_read not in caplog.text:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert caplog.text.count(not_read) == 1
        await replica.record_autoscaling_stats()
        assert replica.state().hook_faults == []
        await replica.close()

    with caplog.at_level("ERROR", logger="ray.serve.raylway"):
        asyncio.run(asyncio.wait_for(run(), 60))


def test_a_replica_starts_while_the_database_is_away_and_joins_it_later(home, tmp_path, monkeypatch):
    deployed = DeployedVariant(version="1", weight=1, path=build(tmp_path / "1", seed=1))
    initial = Traffic(salt="1", policy="weighted", variants={"champion": deployed})
    with Audit() as audit, traffic.set_with_rollback(audit, "income", initial, SERVING):
        pass

    async def run():
        first = Local("income", SERVING, None)
        assert first.state().fault is None
        await first.close()
        (home / "production.db").rename(tmp_path / "production.db")
        monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path}/away/production.db")
        second = Local("income", SERVING, None)
        state = second.state()
        assert (state.versions, state.entry) == ({"champion": "1"}, first.state().entry)
        assert "the database does not answer" in state.fault
        second._recorder.add(prediction("meanwhile"))
        (tmp_path / "away").mkdir()
        (tmp_path / "production.db").rename(tmp_path / "away" / "production.db")
        state = await second.refresh()
        assert state.fault is None
        await second.close()
        records = second._recorder._records
        assert [p.request_id for p in records.predictions("income")] == ["meanwhile"]
        records.close()

    asyncio.run(run())
