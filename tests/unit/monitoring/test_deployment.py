import pytest

from app.monitoring import deployment
from app.monitoring.deployment import Monitor
from app.monitoring.watch import WatchReport
from app.serving.names import WATCH


def test_a_monitor_is_healthy_while_its_watch_runs():
    monitor = Monitor()
    monitor.check_health()
    assert monitor.report().num_failures == 0
    monitor.__del__()
    monitor._watch._thread.join()
    with pytest.raises(RuntimeError, match="has ended"):
        monitor.check_health()


def test_the_deployment_has_one_replica_and_no_route(monkeypatch):
    started = []
    monkeypatch.setattr(deployment, "run_application", lambda *arguments: started.append(arguments))
    deployment.start()
    ((application, *names, route),) = started
    assert (names, route) == ([WATCH, WATCH], None)
    bound = application._bound_deployment
    assert (bound.func_or_class, bound.num_replicas) == (Monitor, 1)
    assert bound.ray_actor_options["num_cpus"] == 0


def test_a_watch_that_does_not_answer_has_no_report(monkeypatch):
    monkeypatch.setattr(deployment, "try_broadcast", lambda *_: [])
    assert deployment.report() is None
    report = WatchReport(1.0, 0, None, {})
    monkeypatch.setattr(deployment, "try_broadcast", lambda *_: [report])
    assert deployment.report() is report
