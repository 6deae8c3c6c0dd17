import pytest

from app.bundle import copies
from app.bundle.manifest import BrokenBundle
from app.errors import UserError
from app.registry import versions
from app.registry.versions import Version
from app.serving.traffic.variants import Deployed, common_schema, load, located
from tests.bundles import build, schema


def test_known_values_are_those_that_every_variant_knows():
    one, other = schema(), schema(["11th", "Doctorate", "HS-grad"])
    common = common_schema({"champion": one, "challenger": other})
    known = {item.name: item.known for item in common.inputs}
    assert known["education"] == ["Doctorate", "HS-grad"]
    assert known["age"] is None
    assert common_schema({"champion": one}) == one


def test_the_order_of_columns_does_not_matter():
    one = schema()
    other = one.model_copy(update={"inputs": one.inputs[::-1]})
    assert common_schema({"champion": one, "challenger": other}) == one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "wealth"}, r"label \(income: >50K, wealth: >50K\)"),
        ({"inputs": schema().inputs[1:]}, r"column age \(.*'max': 120.0.*, absent\)"),
    ],
)
def test_variants_that_take_different_inputs_are_told_apart(change, message):
    other = schema().model_copy(update=change)
    with pytest.raises(UserError, match=f"champion and challenger differ in {message}"):
        common_schema({"champion": schema(), "challenger": other})


def test_bundles_are_verified_and_answer_their_example(tmp_path):
    path = build(tmp_path / "bundle", seed=1)
    deployed = {"champion": Deployed(version="1", weight=1, path=path)}
    assert load(deployed)["champion"].path == path
    (path / "example.json").write_text("{}")
    with pytest.raises(BrokenBundle, match=r"example\.json was changed"):
        load(deployed)


def test_a_bundle_that_is_on_another_machine_is_fetched_by_its_identity(tmp_path, monkeypatch):
    kept_here = copies.keep(build(tmp_path / "built", seed=1))
    elsewhere = Deployed(version="1", weight=1, path="/another/machine", identity=kept_here.name)
    asked = []

    def resolve(model, number):
        asked.append((model, number))
        return Version(model, number, (), kept_here.name)

    monkeypatch.setattr(versions, "resolve", resolve)
    found = located("income", {"champion": elsewhere})
    assert found["champion"].path == kept_here
    assert asked == [("income", "1")]
    assert located("income", found) == found
    assert len(asked) == 1, "what is here is not asked for"
    other = elsewhere.model_copy(update={"identity": "0" * 64})
    with pytest.raises(UserError, match="has another bundle now"):
        located("income", {"champion": other})
    by_hand = Deployed(version="1", weight=1, path="/another/machine")
    assert located("income", {"champion": by_hand}) == {"champion": by_hand}
