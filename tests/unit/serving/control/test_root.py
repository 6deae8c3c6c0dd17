import asyncio
import json

import pytest

from app import __version__
from app.serving.control.root import HANDLERS, Root
from app.serving.http import Refused, Request
from tests.services import FixedBody


def respond(path, statuses, hides_models=False, method="GET"):
    root = Root(hides_models, lambda: statuses)
    response = asyncio.run(root.respond(Request(method, path, {}, FixedBody(b""), "r-1")))
    return response.status, response


def document(path, statuses, hides_models=False):
    status, response = respond(path, statuses, hides_models)
    return status, json.loads(response.body)


RUNNING = {"income": "RUNNING", "flights": "RUNNING"}
UPDATING = {"income": "RUNNING", "flights": "UPDATING"}


def test_the_server_has_metadata_and_is_live():
    assert document("/v2", RUNNING) == (
        200,
        {"name": "raylway", "version": __version__, "extensions": ["binary_tensor_data"]},
    )
    assert document("/v2/health/live", {}) == (200, {"live": True})


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (RUNNING, (200, {"ready": True, "models": RUNNING})),
        (
            UPDATING,
            (503, {"ready": False, "models": UPDATING, "error": "a model is not ready; try again"}),
        ),
        ({}, (503, {"ready": False, "models": {}, "error": "no model is served; try again"})),
    ],
    ids=["running", "updating", "none"],
)
def test_the_server_is_ready_if_every_model_is(statuses, expected):
    assert document("/v2/health/ready", statuses) == expected


def test_models_are_hidden_if_an_endpoint_requires_tokens():
    assert document("/v2/health/ready", RUNNING, hides_models=True) == (200, {"ready": True})
    assert document("/v2/nothing", RUNNING, hides_models=True) == (404, {"error": "no such path"})


def test_an_unknown_path_is_answered_with_the_models():
    error = "no such path; models served under /v2/models: flights, income"
    assert document("/v2/models/incme/predict", RUNNING) == (404, {"error": error})
    error = "no such path; models served under /v2/models: none"
    assert document("/", {}) == (404, {"error": error})


def test_the_documentation_and_its_assets_are_served():
    status, page = respond("/v2/docs", RUNNING)
    assert (status, page.media_type) == (200, "text/html; charset=utf-8")
    assets = [path for path in HANDLERS if path.startswith("/v2/docs/")]
    assert assets
    for path in assets:
        assert path.removeprefix("/v2/docs/").encode() in page.body, "the page loads it"
        status, asset = respond(path, RUNNING)
        assert (status, asset.headers) == (200, {"cache-control": "max-age=86400"})
        assert asset.body


def test_only_get_and_head_are_allowed():
    with pytest.raises(Refused, match="must be GET or HEAD"):
        respond("/v2", RUNNING, method="POST")
    assert respond("/v2", RUNNING, method="HEAD")[0] == 200


def test_the_root_lends_requests_of_the_rate_limits():
    root = Root(False, dict)
    grants = [asyncio.run(root.borrow("income", "bob", 10.0, 7)) for _ in range(2)]
    assert grants[0][0] == 7
    assert grants[1][0] < 7
