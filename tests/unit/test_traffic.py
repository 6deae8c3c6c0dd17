import pytest

from app.audit import Audit
from app.config import Serving
from app.errors import UserError
from app.serving import traffic
from app.serving.traffic import Traffic
from app.serving.variants import Deployed


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
    first = traffic.change(audit, "income", of())
    between = audit.entries()[-1].at
    second = traffic.change(audit, "income", of(90, 10))
    assert traffic.change(audit, "income", of(90, 10)) == second, "it holds already"
    assert traffic.current(audit, "income") == (second, of(90, 10))
    assert traffic.current(audit, "income", at=between) == (first, of())


def test_what_cannot_be_taken_in_does_not_stay(audit):
    traffic.change(audit, "income", of())
    with pytest.raises(UserError, match="broken"), traffic.tried(audit, "income", of(version="4")):
        raise UserError("broken")
    assert traffic.current(audit, "income")[1] == of()
    with traffic.tried(audit, "income", of(version="5")) as number:
        assert traffic.current(audit, "income") == (number, of(version="5"))
    assert traffic.current(audit, "income")[1] == of(version="5")


def test_the_first_traffic_of_all_stays_when_it_cannot_be_taken_in(audit):
    with pytest.raises(UserError), traffic.tried(audit, "income", of()):
        raise UserError("broken")
    assert traffic.current(audit, "income")[1] == of()


def test_settings_are_those_that_it_was_deployed_with_last(audit):
    assert traffic.settings(audit, "income") is None
    serving = Serving.model_validate({"variants": {"champion": {"version": "champion", "weight": 1}}})
    for port in (8001, 8002):
        given = serving.model_copy(update={"port": port})
        audit.add(traffic.SETTINGS, "income", given.model_dump(mode="json"))
    assert traffic.settings(audit, "income") == given


def test_what_is_not_named_keeps_its_weight():
    assert traffic.reweighted(of(), {"challenger": 5}).weights == {"champion": 50, "challenger": 5}
    assert traffic.reweighted(of(), {"challenger": 0}).weights == {"champion": 50}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nobody": 1}, "no variant 'nobody'; there are champion, challenger, dark"),
        ({"champion": -1}, "must be 0 or more, not -1"),
        ({"champion": float("nan")}, "must be 0 or more, not nan"),
        ({"dark": 1}, "dark is a shadow"),
        ({"champion": 0, "challenger": 0}, "at least one variant"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        traffic.reweighted(of(), weights)
