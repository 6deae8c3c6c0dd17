import pytest

from app.bundle import copies
from app.config import Serving
from app.errors import UserError
from app.registry import versions
from app.registry.versions import Version
from app.serving.traffic.registered import registered_traffic, registered_variants
from tests.bundles import build

VARIANTS = {
    "champion": {"version": "champion", "weight": 80},
    "challenger": {"version": "challenger", "weight": 20},
    "third": {"version": "3", "shadow": True},
}


def make_serving(*names):
    return Serving.model_validate({"salt": "s", "variants": {name: VARIANTS[name] for name in names}})


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Version numbers by alias; every number in `numbers` is registered."""
    aliases, numbers = {"champion": "1"}, "123"
    identities = {number: copies.keep(build(tmp_path / number, seed=int(number))).name for number in numbers}

    def find(name, alias):
        number = aliases.get(alias)
        return number and Version(name, number, (alias,), identities[number])

    def resolve(name, number):
        if number not in identities:
            raise UserError(f"no version {number}")
        return Version(name, number, (), identities[number])

    monkeypatch.setattr(versions, "find", find)
    monkeypatch.setattr(versions, "resolve", resolve)
    return aliases


def test_a_variant_without_a_version_is_left_out_with_a_note(registry):
    traffic, notes = registered_traffic("income", make_serving("champion", "challenger"))
    assert traffic.weights == {"champion": 80}
    assert notes == ["variant challenger is left out: no version of income has the alias 'challenger'"]
    registry["challenger"] = "2"
    traffic, notes = registered_traffic("income", make_serving("champion", "challenger"))
    assert (traffic.weights, traffic.salt, notes) == ({"champion": 80, "challenger": 20}, "s", [])


def test_a_traffic_needs_a_variant_with_a_weight(registry):
    registry.clear()
    with pytest.raises(UserError, match=r"for 'income' none has; train one first"):
        registered_traffic("income", make_serving("champion", "third"))


def test_a_version_number_must_be_registered(registry):
    serving = Serving.model_validate({"variants": {"champion": {"version": "9", "weight": 1}}})
    with pytest.raises(UserError, match="no version 9"):
        registered_traffic("income", serving)


def test_a_shadow_has_workers_of_its_own(registry):
    variants, _ = registered_variants("income", make_serving("champion", "third"))
    assert variants["champion"].workers is None
    assert variants["third"].workers == "income@3"
