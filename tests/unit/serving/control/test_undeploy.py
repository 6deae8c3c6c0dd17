import pytest

from app.errors import UserError
from app.serving.control import server
from app.serving.control.undeploy import undeploy
from app.serving.traffic import traffic as traffics
from app.state.audit import Audit
from tests.traffics import place
from tests.unit.serving.traffic.test_traffic import SERVING, make_traffic


@pytest.fixture
def audit():
    with Audit() as audit:
        for model in ("income", "flights"):
            place(audit, model, make_traffic(), SERVING)
        yield audit


@pytest.fixture(autouse=True)
def stopped(monkeypatch, fake_serve):
    """Notes when the server is stopped."""
    monkeypatch.setattr(server, "stop", fake_serve.shutdown)


def test_an_endpoint_is_removed_with_its_workers_and_the_others_stay(fake_serve, audit):
    for name in ("income", "income@1", "flights", "flights@1"):
        fake_serve.add(name)
    undeploy("income")
    assert fake_serve.events == [("delete", "income"), ("delete", "income@1")]
    assert traffics.read_current(audit, "income") is None
    assert traffics.read_current(audit, "flights") is not None


def test_the_server_stops_with_the_last_endpoint(fake_serve, audit):
    fake_serve.add("income")
    undeploy("income")
    assert fake_serve.events == [("delete", "income"), ("shutdown",)]


def test_an_endpoint_that_is_not_served_is_named_and_its_rest_is_removed(fake_serve, audit):
    """A command that was killed after its entry in the audit log has left workers."""
    for name in ("income@1", "flights"):
        fake_serve.add(name)
    with pytest.raises(UserError, match="income is not served; served are: flights"):
        undeploy("income")
    assert fake_serve.events == [("delete", "income@1")]
