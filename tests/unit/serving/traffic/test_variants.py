import pytest

from app.bundle import copies
from app.bundle.manifest import BrokenBundle
from app.errors import UserError
from app.registry import versions
from app.registry.versions import Version
from app.serving.traffic.variants import DeployedVariant, common_schema, open_bundles, with_local_bundles
from tests.bundles import build, schema


def test_known_categories_are_those_that_every_variant_knows():
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
def test_the_differences_of_variants_with_different_inputs_are_named(change, message):
    other = schema().model_copy(update=change)
    with pytest.raises(UserError, match=f"champion and challenger differ in {message}"):
        common_schema({"champion": schema(), "challenger": other})


def test_bundles_are_verified_when_they_are_opened(tmp_path):
    path = build(tmp_path / "bundle", seed=1)
    deployed = {"champion": DeployedVariant(version="1", weight=1, path=path)}
    assert open_bundles(deployed)["champion"].path == path
    (path / "example.json").write_text("{}")
    with pytest.raises(BrokenBundle, match=r"example\.json was changed"):
        open_bundles(deployed)


def test_a_bundle_on_another_machine_is_fetched_by_its_identity(tmp_path, monkeypatch):
    fetched = copies.keep(build(tmp_path / "built", seed=1))
    elsewhere = DeployedVariant(version="1", weight=1, path="/another/machine", identity=fetched.name)
    resolved = []

    def resolve(model, number):
        resolved.append((model, number))
        return Version(model, number, (), fetched.name)

    monkeypatch.setattr(versions, "resolve", resolve)
    local = with_local_bundles("income", {"champion": elsewhere})
    assert local["champion"].path == fetched
    assert resolved == [("income", "1")]
    assert with_local_bundles("income", local) == local
    assert len(resolved) == 1, "a bundle on this machine is not looked up"
    other = elsewhere.model_copy(update={"identity": "0" * 64})
    with pytest.raises(UserError, match="the registry has another bundle now"):
        with_local_bundles("income", {"champion": other})
    unregistered = DeployedVariant(version="1", weight=1, path="/another/machine")
    assert with_local_bundles("income", {"champion": unregistered}) == {"champion": unregistered}
