import math
import time

import pytest
from pydantic import ValidationError

from app.config import Serving
from app.errors import UserError
from app.serving.traffic import traffic
from app.serving.traffic.traffic import OFF, Traffic
from app.serving.traffic.variants import Deployed
from app.state.audit import Audit, Changed
from tests.traffics import place

SERVING = Serving.model_validate({"variants": {"champion": {"version": "champion", "weight": 1}}})


def of(champion=50.0, challenger=50.0, version="2") -> Traffic:
    return Traffic(
        salt="1",
        policy="weighted",
        variants={
            "champion": Deployed(version="1", weight=champion, path="/bundles/1"),
            "challenger": Deployed(version=version, weight=challenger, path=f"/bundles/{version}"),
            "dark": Deployed(version="3", weight=0, path="/bundles/3", shadow=True),
        },
    )


@pytest.fixture
def audit():
    audit = Audit()
    yield audit
    audit.close()


def test_what_holds_is_what_was_written_last_and_what_held_can_be_asked(audit):
    assert traffic.current(audit, "income") is None
    first = place(audit, "income", of(), SERVING)
    between = audit.entries()[-1].at
    held = traffic.current(audit, "income")
    assert held == (first, of(), SERVING)
    second = traffic.change(audit, "income", held, of(90, 10))
    held = traffic.current(audit, "income")
    assert held == (second, of(90, 10), SERVING), "a change keeps the settings"
    assert traffic.change(audit, "income", held, of(90, 10)) == second, "it holds already"
    assert place(audit, "income", of(90, 10), SERVING) == second
    assert traffic.current(audit, "income", at=between) == (first, of(), SERVING)


def test_what_holds_now_holds_though_the_clock_was_set_back(audit, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    place(audit, "income", of(), SERVING)
    now += 7200
    place(audit, "income", of(90, 10), SERVING)
    now -= 3600
    assert traffic.current(audit, "income").traffic == of(90, 10)
    assert traffic.current(audit, "income", at=now).traffic == of(90, 10)
    assert traffic.current(audit, "income", at=now - 60).traffic == of()


def test_a_change_of_what_does_not_hold_any_more_is_refused(audit):
    place(audit, "income", of(version="1"), SERVING)
    read = traffic.current(audit, "income")
    deployed = place(audit, "income", of(version="3"), SERVING)
    with pytest.raises(Changed, match=rf"entry {deployed}"):
        traffic.change(audit, "income", read, of(90, 10, version="1"))
    with pytest.raises(Changed), traffic.tried(audit, "income", of(), SERVING, expected=read.number):
        pass
    assert traffic.current(audit, "income").traffic == of(version="3")


def test_what_cannot_be_taken_in_does_not_stay(audit):
    place(audit, "income", of(), SERVING)
    other = SERVING.model_copy(update={"port": 8001})

    def refuse():
        with traffic.tried(audit, "income", of(version="4"), other):
            assert traffic.current(audit, "income")[1:] == (of(version="4"), other)
            raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        refuse()
    assert traffic.current(audit, "income") == (3, of(), SERVING), "a new entry, and the settings as well"
    with traffic.tried(audit, "income", of(version="5"), SERVING) as number:
        assert traffic.current(audit, "income") == (number, of(version="5"), SERVING)
    assert traffic.current(audit, "income").traffic == of(version="5")


def test_what_somebody_else_wrote_meanwhile_is_not_undone(audit):
    place(audit, "income", of(), SERVING)

    def refuse():
        with traffic.tried(audit, "income", of(version="4"), SERVING):
            place(audit, "income", of(version="5"), SERVING)
            raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        refuse()
    assert traffic.current(audit, "income").traffic == of(version="5")


def test_a_first_traffic_that_cannot_be_taken_in_leaves_none(audit):
    with pytest.raises(UserError), traffic.tried(audit, "income", of(), SERVING):
        raise UserError("broken")
    assert traffic.current(audit, "income") is None
    assert traffic.settings(audit, "income") is None


def test_an_endpoint_that_was_taken_off_has_no_traffic_until_it_is_deployed_again(audit):
    place(audit, "income", of(), SERVING)
    served = audit.entries()[-1].at
    for _ in range(2):
        traffic.take_off(audit, "income")
        assert traffic.current(audit, "income") is None
    assert [entry.action for entry in audit.entries()] == [traffic.ACTION, OFF]
    assert traffic.current(audit, "income", at=served).traffic == of()
    place(audit, "income", of(), SERVING)
    assert traffic.settings(audit, "income") == SERVING


@pytest.mark.parametrize(
    "details",
    [
        {"salt": "1", "policy": "weighted", "variants": {}, "serving": {"nothing": 1}},
        {"salt": "1", "policy": "weighted", "variants": {}},
        {"some": "thing"},
    ],
)
def test_an_entry_that_cannot_be_read_is_told_and_can_be_replaced(audit, details):
    audit.add(traffic.ACTION, "income", details)
    with pytest.raises(UserError, match=r"entry 1 .* of income, cannot be read: .*`raylway serve`"):
        traffic.current(audit, "income")
    with pytest.raises(UserError, match="broken"), traffic.tried(audit, "income", of(), SERVING):
        raise UserError("broken")
    assert audit.entries()[-1].details == details
    place(audit, "income", of(), SERVING)
    assert traffic.current(audit, "income").traffic == of()


def test_what_is_not_named_keeps_its_weight():
    assert traffic.reweighted(of(), {"challenger": 5}).weights == {"champion": 50, "challenger": 5}
    assert traffic.reweighted(of(), {"challenger": 0}).weights == {"champion": 50}


UNANSWERABLE = [
    ({"champion": -1}, "must be 0 or more, not -1"),
    ({"champion": math.nan}, "must be 0 or more, not nan"),
    ({"champion": math.inf}, "must be 0 or more, not inf"),
    ({"dark": 1}, "dark is a shadow"),
    ({"champion": 0, "challenger": 0}, "at least one variant"),
    ({"champion": 1.7e308, "challenger": 1.7e308}, "sum must be finite"),
]


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"nobody": 1}, "no variant 'nobody'; there are champion, challenger, dark"), *UNANSWERABLE],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        traffic.reweighted(of(), weights)


@pytest.mark.parametrize(("weights", "message"), [*UNANSWERABLE, (None, "at least one variant")])
def test_nobody_makes_a_traffic_that_nobody_answers(weights, message):
    """Whichever way it is made: anew, from JSON, or as a changed copy."""
    variants = (
        {
            name: variant.model_copy(update={"weight": weights.get(name, variant.weight)})
            for name, variant in of().variants.items()
        }
        if weights
        else {}
    )
    with pytest.raises(UserError, match=message):
        Traffic(salt="1", policy="weighted", variants=variants)
    with pytest.raises(UserError, match=message):
        of().model_copy(update={"variants": variants})
    with pytest.raises((UserError, ValidationError)):
        Traffic.model_validate({"salt": "1", "policy": "weighted", "variants": dict(variants)})
