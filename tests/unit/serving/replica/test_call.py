import json
from types import SimpleNamespace

import pytest

from app.serving.http import Refused
from app.serving.protocols import rows
from tests.bundles import ROWS
from tests.services import REQUEST_ID, call, loaded, run, services


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("bundles"), champion=50, challenger=50)


def query(variants, unit=None):
    return rows.parse(json.dumps({"rows": ROWS[:2], "unit": unit}).encode(), variants.contract)


def test_the_unit_comes_from_the_body_else_the_header_else_the_request_id(variants):
    for unit, header, chosen in [("u-1", "u-2", "u-1"), (None, "u-2", "u-2"), (None, "", REQUEST_ID)]:
        routed = call(services(variants), x_raylway_unit=header)
        routed.choose(query(variants, unit))
        assert (routed.unit, routed.variant) == (chosen, variants.choose(chosen))
        assert (routed.is_forced, routed.num_rows) == (False, 2)


def test_a_header_unit_of_too_many_characters_is_refused(variants):
    with pytest.raises(Refused, match="must not exceed 256 characters"):
        call(services(variants), x_raylway_unit="x" * 257).choose(query(variants))


def test_a_variant_is_forced_by_version_or_by_name(variants):
    by_version = call(services(variants))
    by_version.version = "2"
    by_name = call(services(variants), x_raylway_variant="challenger")
    for forced in (by_version, by_name):
        forced.choose(query(variants, unit="u-1"))
        assert (forced.variant, forced.is_forced, forced.unit) == ("challenger", True, "u-1")


def test_a_version_or_variant_that_is_not_served_is_refused(variants):
    missing = call(services(variants))
    missing.version = "7"
    with pytest.raises(Refused, match="version 7 of income is not served; these are: 1, 2") as refused:
        missing.forced_variant()
    assert refused.value.status == 404
    with pytest.raises(Refused, match="must be one of champion, challenger") as refused:
        call(services(variants), x_raylway_variant="other").forced_variant()
    assert refused.value.status == 422


def test_variants_that_are_loaded_while_the_body_arrives_answer(variants, tmp_path):
    later = loaded(tmp_path, champion=1)
    parts = services(variants)
    routed = call(parts, b"{}")
    parts.loader.loaded = later
    assert routed.loaded is variants
    assert run(routed.read_body()) == b"{}"
    assert routed.loaded is later


@pytest.mark.parametrize(
    "headers", [{"content_type": "text/plain"}, {"content_encoding": "gzip"}, {"content_type": "image/png"}]
)
def test_a_body_of_another_type_is_refused_without_being_read(variants, headers):
    routed = call(services(variants), b"{}", **headers)
    with pytest.raises(Refused, match="the body must be application/json, not compressed") as refused:
        run(routed.read_body())
    assert refused.value.status == 415
    assert not routed.request.body.is_read


def test_a_prediction_of_the_replica_has_the_values_of_the_bundle(variants):
    routed = call(services(variants))
    routed.choose(query(variants))
    columns = query(variants).columns
    answer = routed.answer(run(routed.predict(columns)))
    assert answer.probabilities.tolist() == variants.bundles[routed.variant].predict(columns).tolist()
    assert (answer.model, answer.variant, answer.request_id) == ("income", routed.variant, REQUEST_ID)
    assert answer.version == variants.versions[routed.variant]


def test_workers_that_do_not_answer_are_a_503_to_be_repeated(variants):
    async def fail(columns):
        raise TimeoutError

    apart = SimpleNamespace(
        **{name: getattr(variants, name) for name in ("versions", "schema", "contract", "choose", "weights")},
        bundles={},
        workers=dict.fromkeys(("champion", "challenger"), SimpleNamespace(predict=fail)),
    )
    routed = call(services(apart))
    routed.choose(query(variants))
    with pytest.raises(Refused, match="does not answer now; try again") as refused:
        run(routed.predict({}))
    assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "1"})
