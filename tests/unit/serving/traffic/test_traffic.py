import math
import time

import pytest
from pydantic import ValidationError

from app.config import Serving
from app.errors import UserError
from app.serving.traffic import traffic
from app.serving.traffic.traffic import UNDEPLOY_ACTION, Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit, Conflict
from tests.traffics import place

SERVING = Serving.model_validate({"variants": {"champion": {"version": "champion", "weight": 1}}})


def make_traffic(champion=50.0, challenger=50.0, version="2") -> Traffic:
    """A traffic with the given weights; `version` is the challenger's."""
    return Traffic(
        salt="1",
        policy="weighted",
        variants={
            "champion": DeployedVariant(version="1", weight=champion, path="/bundles/1"),
            "challenger": DeployedVariant(version=version, weight=challenger, path=f"/bundles/{version}"),
            "dark": DeployedVariant(version="3", weight=0, path="/bundles/3", shadow=True),
        },
    )


@pytest.fixture
def audit():
    audit = Audit()
    yield audit
    audit.close()


def test_the_current_traffic_is_the_newest_entry_and_older_entries_answer_for_their_time(audit):
    assert traffic.read_current(audit, "income") is None
    first = place(audit, "income", make_traffic(), SERVING)
    between = audit.entries()[-1].at
    current = traffic.read_current(audit, "income")
    assert current == (first, make_traffic(), SERVING)
    second = traffic.update(audit, "income", current, make_traffic(90, 10))
    current = traffic.read_current(audit, "income")
    assert current == (second, make_traffic(90, 10), SERVING), "an update keeps the settings"
    assert traffic.update(audit, "income", current, make_traffic(90, 10)) == second, "nothing is written"
    assert place(audit, "income", make_traffic(90, 10), SERVING) == second
    assert traffic.read_current(audit, "income", at=between) == (first, make_traffic(), SERVING)


def test_the_newest_entry_is_current_even_if_the_clock_was_set_back(audit, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    place(audit, "income", make_traffic(), SERVING)
    now += 7200
    place(audit, "income", make_traffic(90, 10), SERVING)
    now -= 3600
    assert traffic.read_current(audit, "income").traffic == make_traffic(90, 10)
    assert traffic.read_current(audit, "income", at=now).traffic == make_traffic(90, 10)
    assert traffic.read_current(audit, "income", at=now - 60).traffic == make_traffic()


def test_a_change_based_on_an_older_entry_is_refused(audit):
    place(audit, "income", make_traffic(version="1"), SERVING)
    outdated = traffic.read_current(audit, "income")
    newest = place(audit, "income", make_traffic(version="3"), SERVING)
    with pytest.raises(Conflict, match=rf"entry {newest}"):
        traffic.update(audit, "income", outdated, make_traffic(90, 10, version="1"))
    change = traffic.set_with_rollback(audit, "income", make_traffic(), SERVING, expected=outdated.number)
    with pytest.raises(Conflict), change:
        pass
    assert traffic.read_current(audit, "income").traffic == make_traffic(version="3")


def test_a_traffic_that_fails_to_load_is_rolled_back_with_its_settings(audit):
    place(audit, "income", make_traffic(), SERVING)
    other = SERVING.model_copy(update={"port": 8001})

    def fail_to_load():
        with traffic.set_with_rollback(audit, "income", make_traffic(version="4"), other):
            assert traffic.read_current(audit, "income")[1:] == (make_traffic(version="4"), other)
            raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        fail_to_load()
    assert traffic.read_current(audit, "income") == (3, make_traffic(), SERVING), (
        "the rollback is a new entry"
    )
    with traffic.set_with_rollback(audit, "income", make_traffic(version="5"), SERVING) as number:
        assert traffic.read_current(audit, "income") == (number, make_traffic(version="5"), SERVING)
    assert traffic.read_current(audit, "income").traffic == make_traffic(version="5")


def test_a_rollback_keeps_an_entry_that_somebody_else_has_written(audit):
    place(audit, "income", make_traffic(), SERVING)

    def fail_to_load():
        with traffic.set_with_rollback(audit, "income", make_traffic(version="4"), SERVING):
            place(audit, "income", make_traffic(version="5"), SERVING)
            raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        fail_to_load()
    assert traffic.read_current(audit, "income").traffic == make_traffic(version="5")


def test_the_rollback_of_a_first_traffic_leaves_none(audit):
    with pytest.raises(UserError), traffic.set_with_rollback(audit, "income", make_traffic(), SERVING):
        raise UserError("broken")
    assert traffic.read_current(audit, "income") is None


def test_an_undeployed_endpoint_has_no_traffic_until_it_is_deployed_again(audit):
    place(audit, "income", make_traffic(), SERVING)
    deployed_at = audit.entries()[-1].at
    for _ in range(2):
        traffic.record_undeploy(audit, "income")
        assert traffic.read_current(audit, "income") is None
    assert [entry.action for entry in audit.entries()] == [traffic.TRAFFIC_ACTION, UNDEPLOY_ACTION]
    assert traffic.read_current(audit, "income", at=deployed_at).traffic == make_traffic()
    place(audit, "income", make_traffic(), SERVING)
    assert traffic.read_current(audit, "income").serving == SERVING


@pytest.mark.parametrize(
    "details",
    [
        {"salt": "1", "policy": "weighted", "variants": {}, "serving": {"nothing": 1}},
        {"salt": "1", "policy": "weighted", "variants": {}},
        {"some": "thing"},
    ],
)
def test_an_unreadable_entry_is_reported_and_can_be_replaced(audit, details):
    audit.add(traffic.TRAFFIC_ACTION, "income", details)
    with pytest.raises(UserError, match=r"entry 1 .* of income, cannot be read: .*`raylway serve`"):
        traffic.read_current(audit, "income")
    change = traffic.set_with_rollback(audit, "income", make_traffic(), SERVING)
    with pytest.raises(UserError, match="broken"), change:
        raise UserError("broken")
    assert audit.entries()[-1].details == details
    place(audit, "income", make_traffic(), SERVING)
    assert traffic.read_current(audit, "income").traffic == make_traffic()


def test_with_weights_keeps_the_weights_of_variants_that_are_not_named():
    assert traffic.with_weights(make_traffic(), {"challenger": 5}).weights == {
        "champion": 50, "challenger": 5,
    }  # fmt: skip
    assert traffic.with_weights(make_traffic(), {"challenger": 0}).weights == {"champion": 50}


INVALID_WEIGHTS = [
    ({"champion": -1}, "must be 0 or more, not -1"),
    ({"champion": math.nan}, "must be 0 or more, not nan"),
    ({"champion": math.inf}, "must be 0 or more, not inf"),
    ({"dark": 1}, "dark is a shadow"),
    ({"champion": 0, "challenger": 0}, "at least one variant"),
    ({"champion": 1.7e308, "challenger": 1.7e308}, "sum must be finite"),
]


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"nobody": 1}, "no variant 'nobody'; there are champion, challenger, dark"), *INVALID_WEIGHTS],
)
def test_with_weights_refuses_invalid_weights(weights, message):
    with pytest.raises(UserError, match=message):
        traffic.with_weights(make_traffic(), weights)


@pytest.mark.parametrize(("weights", "message"), [*INVALID_WEIGHTS, (None, "at least one variant")])
def test_a_traffic_with_invalid_weights_cannot_be_constructed(weights, message):
    """The constructor, JSON and a changed copy all refuse the weights."""
    variants = (
        {
            name: variant.model_copy(update={"weight": weights.get(name, variant.weight)})
            for name, variant in make_traffic().variants.items()
        }
        if weights
        else {}
    )
    with pytest.raises(UserError, match=message):
        Traffic(salt="1", policy="weighted", variants=variants)
    with pytest.raises(UserError, match=message):
        make_traffic().model_copy(update={"variants": variants})
    with pytest.raises((UserError, ValidationError)):
        Traffic.model_validate({"salt": "1", "policy": "weighted", "variants": dict(variants)})
