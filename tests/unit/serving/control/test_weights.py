import pytest

from app.errors import UserError
from app.serving.control import weights
from app.serving.control.weights import set_weights
from app.serving.traffic import traffic as traffics
from app.state.audit import Audit
from tests.traffics import place
from tests.unit.serving.traffic.test_traffic import SERVING, make_traffic


@pytest.fixture
def audit():
    with Audit() as audit:
        yield audit


@pytest.fixture
def refreshed(monkeypatch):
    """The entries that the replicas have loaded."""
    entries = []
    monkeypatch.setattr(weights, "refresh", lambda name, entry: entries.append(entry))
    return entries


def test_weights_are_recorded_and_loaded(fake_serve, audit, refreshed):
    fake_serve.add("income")
    place(audit, "income", make_traffic(50, 50), SERVING)
    traffic = set_weights("income", {"challenger": 5})
    assert traffic.weights == {"champion": 50, "challenger": 5}
    current = traffics.read_current(audit, "income")
    assert (current.traffic, current.serving, refreshed) == (traffic, SERVING, [current.number])


def test_weights_that_the_replicas_cannot_load_are_rolled_back(fake_serve, audit, monkeypatch):
    def fail(name, entry):
        raise UserError("cannot load")

    monkeypatch.setattr(weights, "refresh", fail)
    fake_serve.add("income")
    place(audit, "income", make_traffic(50, 50), SERVING)
    with pytest.raises(UserError, match="cannot load"):
        set_weights("income", {"challenger": 5})
    assert traffics.read_current(audit, "income").traffic == make_traffic(50, 50)


def test_an_endpoint_that_is_not_served_has_no_weights(fake_serve, audit, refreshed):
    with pytest.raises(UserError, match="income is not served now"):
        set_weights("income", {"challenger": 5})
    place(audit, "income", make_traffic(), SERVING)
    with pytest.raises(UserError, match="income is not served now"):
        set_weights("income", {"challenger": 5})


def test_the_weights_of_a_bandit_cannot_be_set(fake_serve, audit, refreshed):
    fake_serve.add("income")
    place(audit, "income", make_traffic().model_copy(update={"policy": "bandit"}), SERVING)
    with pytest.raises(UserError, match="must be weighted"):
        set_weights("income", {"challenger": 5})
    assert refreshed == []
