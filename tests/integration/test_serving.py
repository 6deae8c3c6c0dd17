"""Two variants served by Ray Serve behind HAProxy: requests over HTTP and gRPC."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import numpy as np
import pytest

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.cluster.ports import free_ports
from app.config import Serving
from app.errors import UserError
from app.serving.control import deploy
from app.serving.control.undeploy import undeploy_all
from app.serving.gateway import settings as gateway_settings
from app.serving.traffic import routing
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.traffic import read_current as read_current_traffic
from app.serving.traffic.variants import DeployedVariant, open_bundles
from app.state.audit import Audit
from tests.bundles import ROWS, build
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    # Ray Serve's imports raise these.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]

WEIGHTS = {"champion": 75.0, "challenger": 25.0}
MAX_BODY_BYTES = 100_000
PREDICT = "/v2/models/income/predict"
INFER = "/v2/models/income/infer"


def traffic(variants: dict[str, DeployedVariant]) -> Traffic:
    return Traffic(salt="test", policy="weighted", variants=variants)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        name: DeployedVariant(version=str(number), weight=weight, path=build(folder / name, seed=number))
        for number, (name, weight) in enumerate(WEIGHTS.items(), start=1)
    }


@pytest.fixture(scope="module")
def settings():
    ports = free_ports(2)
    return Serving.model_validate(
        {
            "port": ports[0],
            "grpc_port": ports[1],
            "salt": "test",
            "variants": {name: {"version": name, "weight": weight} for name, weight in WEIGHTS.items()},
            "limits": {"max_body_bytes": MAX_BODY_BYTES, "max_rows": 100},
        }
    )


@pytest.fixture(scope="module")
def url(ray_cluster, variants, settings):
    yield deploy.deploy(settings, "income", traffic(variants))
    undeploy_all()


@pytest.fixture(scope="module")
def client(url):
    # Every response needs a content-length: without one, a client takes half a response for a whole one.
    def check(response: httpx.Response) -> None:
        assert "content-length" in response.headers
        assert response.status_code != 500, response.read()

    hooks = {"response": [check]}
    with httpx.Client(base_url=url, trust_env=False, timeout=20, event_hooks=hooks) as client:
        yield client


@pytest.fixture(scope="module")
def triton(url):
    from tritonclient.http import InferenceServerClient

    with InferenceServerClient(url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def expected(variants):
    """The predictions of each variant for ROWS."""
    bundles = {name: Bundle(variant.path) for name, variant in variants.items()}
    return {name: bundle.predict(columns_of(bundle.schema, ROWS)) for name, bundle in bundles.items()}


def raw(url: str, request: bytes) -> int:
    """The status of the response to raw bytes, for requests that no client library sends."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert len(response.read()) == int(response.headers["content-length"])
        return response.status


def post(body: bytes, *headers: bytes, path: str = PREDICT) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close",
        b"Content-Type: application/json", b"Content-Length: %d" % len(body), *headers,
    ]  # fmt: skip
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_a_port_in_use_is_refused(ray_cluster, variants, settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"{port}.*serving\.port"):
            deploy.deploy(settings.model_copy(update={"port": port}), "income", traffic(variants))


def test_a_first_deployment_that_fails_leaves_nothing_open(
    ray_cluster, variants, settings, tmp_path, monkeypatch
):
    bundles = open_bundles(variants)
    # This process can open the bundle, but a replica cannot.
    monkeypatch.setattr(deploy, "open_bundles", lambda *_: bundles)
    gone = {"champion": DeployedVariant(version="3", weight=1, path=tmp_path / "gone")}
    with pytest.raises(UserError, match="is not a bundle"):
        deploy.deploy(settings, "income", traffic(gone))
    assert gateway_settings.read() is None
    assert not listens(settings.port)
    assert not listens(settings.grpc_port)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_a_prediction_has_the_values_of_the_bundle_and_names_the_variant(client, expected):
    response = client.post(PREDICT, json={"rows": ROWS, "unit": "user-17"}, headers={"x-request-id": "r-1"})
    assert response.status_code == 200
    answer = response.json()
    variant = routing.choose("user-17", "test", WEIGHTS)
    assert response.headers.get_list("x-request-id") == ["r-1"]
    predictions = answer.pop("predictions")
    assert answer == {
        "model": "income",
        "variant": variant,
        "version": {"champion": "1", "challenger": "2"}[variant],
        "request_id": "r-1",
        "label": {"column": "income", "positive": ">50K"},
    }
    np.testing.assert_allclose([p["probability"] for p in predictions], expected[variant], rtol=1e-6)
    assert [p["positive"] for p in predictions] == list(expected[variant] >= 0.5)


def test_units_are_split_by_weight_and_keep_their_variant(client):
    units = [f"user-{i}" for i in range(400)]
    answers = [client.post(PREDICT, json={"rows": ROWS[:1], "unit": u}).json()["variant"] for u in units]
    assert answers == [routing.choose(unit, "test", WEIGHTS) for unit in units]
    assert 70 <= Counter(answers)["challenger"] <= 130  # 100 expected, standard deviation 8.7
    by_header = client.post(PREDICT, json={"rows": ROWS[:1]}, headers={"x-raylway-unit": "user-1"})
    assert by_header.json()["variant"] == answers[1]


def test_without_a_unit_each_request_is_routed_at_random(client):
    answers = [client.post(PREDICT, json={"rows": ROWS[:1]}).json() for _ in range(40)]
    assert {answer["variant"] for answer in answers} == set(WEIGHTS)
    assert len({answer["request_id"] for answer in answers}) == 40
    replaced = client.post(PREDICT, json={"rows": ROWS[:1]}, headers={"x-request-id": "a b" * 100})
    assert replaced.json()["request_id"] == replaced.headers["x-request-id"] != "a b" * 100


def test_a_version_can_be_requested(client, expected):
    for number, variant in (("1", "champion"), ("2", "challenger")):
        answer = client.post(f"/v2/models/income/versions/{number}/predict", json={"rows": ROWS}).json()
        assert (answer["version"], answer["variant"]) == (number, variant)
        probabilities = [p["probability"] for p in answer["predictions"]]
        np.testing.assert_allclose(probabilities, expected[variant], rtol=1e-6)
    assert client.get("/v2/models/income/versions/9/ready").status_code == 404


@pytest.mark.parametrize("binary", [True, False])
def test_the_triton_client_works_unchanged(triton, expected, binary):
    from tritonclient.http import InferInput, InferRequestedOutput

    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("income")
    assert triton.is_model_ready("income", "2")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = triton.get_model_metadata("income")
    assert (metadata["name"], metadata["versions"]) == ("income", ["1", "2"])
    inputs = []
    for column in metadata["inputs"]:
        values = [row[column["name"]] for row in ROWS]
        if column["datatype"] == "FP64":
            array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)[:, None]
            if not binary:
                array = np.nan_to_num(array, nan=40.0)
        else:
            array = np.array(["" if v is None else v for v in values], dtype=np.object_)[:, None]
        inputs.append(InferInput(column["name"], list(array.shape), column["datatype"]))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    outputs = None if binary else [InferRequestedOutput("probability", binary_data=False)]
    parameters = {"unit": "user-17"}
    result = triton.infer("income", inputs, outputs=outputs, request_id="mine", parameters=parameters)
    response = result.get_response()
    variant = routing.choose("user-17", "test", WEIGHTS)
    assert response["id"] == "mine"
    assert response["parameters"]["variant"] == variant
    assert response["model_version"] == {"champion": "1", "challenger": "2"}[variant]
    rows = [0, 1, 2] if binary else [0, 2]
    np.testing.assert_array_equal(result.as_numpy("probability")[rows, 0], expected[variant][rows])


@pytest.fixture(scope="module")
def grpc(url, settings):
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(f"127.0.0.1:{settings.grpc_port}") as client:
        yield client


def test_the_grpc_client_works_unchanged(grpc, expected):
    from tritonclient.grpc import InferInput
    from tritonclient.utils import InferenceServerException

    assert grpc.is_server_live()
    assert grpc.is_server_ready()
    assert grpc.is_model_ready("income", "2")
    assert not grpc.is_model_ready("incomes")
    assert grpc.get_server_metadata().extensions == ["binary_tensor_data"]
    metadata = grpc.get_model_metadata("income")
    assert list(metadata.versions) == ["1", "2"]

    def infer(rows, **options):
        inputs = []
        for column in metadata.inputs:
            missing = np.nan if column.datatype == "FP64" else ""
            values = [missing if row[column.name] is None else row[column.name] for row in rows]
            dtype = np.float64 if column.datatype == "FP64" else np.object_
            inputs.append(InferInput(column.name, [len(rows), 1], column.datatype))
            inputs[-1].set_data_from_numpy(np.array(values, dtype=dtype)[:, None])
        return grpc.infer("income", inputs, **options)

    answered = infer(ROWS, request_id="mine", parameters={"unit": "user-17"})
    variant = routing.choose("user-17", "test", WEIGHTS)
    assert answered.get_response().id == "mine"
    assert answered.get_response().parameters["variant"].string_param == variant
    np.testing.assert_array_equal(answered.as_numpy("probability")[:, 0], expected[variant])
    by_header = infer(ROWS, headers={"x-raylway-unit": "user-17"})
    assert by_header.get_response().parameters["variant"].string_param == variant
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*age.*at most 120"):
        infer([{**ROWS[0], "age": 999}])
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        infer(ROWS, model_version="9")


def test_attributions_sum_to_the_prediction(client, expected):
    answered = client.post("/v2/models/income/explain", json={"rows": ROWS, "unit": "user-17"}).json()
    variant = routing.choose("user-17", "test", WEIGHTS)
    assert (answered["variant"], answered["of"]) == (variant, "log-odds of >50K")
    for explanation, p in zip(answered["explanations"], expected[variant], strict=True):
        total = explanation["base"] + sum(explanation["attributions"].values())
        assert total == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
    assert client.post("/v2/models/income/explain", json={"rows": ROWS * 6}).status_code == 413


def test_the_example_in_the_openapi_document_works(client):
    document = client.get("/v2/models/income/openapi.json").json()
    predict = document["paths"][PREDICT]["post"]
    example = predict["requestBody"]["content"]["application/json"]["example"]
    answered = client.post(PREDICT, json=example)
    assert answered.status_code == 200
    documented = predict["responses"]["200"]["content"]["application/json"]["example"]
    assert set(answered.json()) == set(documented)
    page = client.get("/v2/docs?model=income")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for line in page.text.splitlines():
        for asset in re.findall(r"/v2/docs/[a-z.-]+", line):
            assert client.get(asset).status_code == 200


ROW = b'{"age": 39, "education": "Bachelors", "gender": "Male"}'


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b'{"rows": [' + ROW + b"]}"),
        (400, b""),
        (400, b"\xff\xfe"),
        (400, b'{"rows": [' + ROW),
        (400, b'{"rows": ' + b"[" * 50_000),
        (400, b'{"rows": [{"age": 39, "education": "\\ud800", "gender": "Male"}]}'),
        (422, b"[]"),
        (422, b'{"rows": []}'),
        (422, b'{"rows": [{"age": NaN, "education": "Bachelors", "gender": "Male"}]}'),
        (422, b'{"rows": [{"age": 1e999, "education": "Bachelors", "gender": "Male"}]}'),
        (200, b'{"rows": [{"age": true, "education": "Bachelors", "gender": "Male"}]}'),
        (422, b'{"rows": [{"age": "39", "education": "Bachelors", "gender": "Male"}]}'),
        (422, b'{"rows": [{"age": 39, "education": "None such", "gender": "Male"}]}'),
        (422, b'{"unit": "\\u0000", "rows": [' + ROW + b"]}"),
        (413, b'{"rows": [' + b",".join([ROW] * 101) + b"]}"),
        (413, b" " * (MAX_BODY_BYTES + 1)),
    ],
)
def test_a_body_gets_its_status(client, status, body):
    response = client.post(PREDICT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert status == 200 or isinstance(response.json()["error"], str)


@pytest.mark.parametrize(
    ("status", "method", "path", "headers"),
    [
        (404, "GET", "/", {}),
        (404, "GET", "/v2/models/income/nothing", {}),
        (404, "GET", "/v2/models/income/", {}),
        (404, "POST", "/v2/models/incomes/predict", {}),
        (404, "POST", "/v2/models/income/versions/9/infer", {}),
        (405, "GET", PREDICT, {}),
        (405, "DELETE", "/v2/models/income", {}),
        (405, "POST", "/v2/health/live", {}),
        (415, "POST", PREDICT, {"content-type": "text/html"}),
        (415, "POST", PREDICT, {"content-type": "application/json", "content-encoding": "gzip"}),
        (422, "POST", PREDICT, {"content-type": "application/json", "x-raylway-unit": "x" * 257}),
        (400, "POST", INFER, {"inference-header-content-length": "100"}),
        (422, "POST", INFER, {}),
    ],
)
def test_a_request_line_and_headers_get_their_status(client, status, method, path, headers):
    content = b'{"rows": [' + ROW + b"]}" if path == PREDICT else b"{}"
    response = client.request(method, path, content=content if method == "POST" else None, headers=headers)
    assert response.status_code == status
    assert isinstance(response.json()["error"], str)


READ_PATHS = ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/docs", "/v2/models/income"]
READ_PATHS += ["/v2/models/income/ready", "/v2/models/income/versions/1", "/v2/models/income/openapi.json"]


@pytest.mark.parametrize("path", READ_PATHS)
def test_head_has_the_status_and_length_of_get(client, path):
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert client.put(path).headers["allow"] == "GET, HEAD"


def test_the_error_for_an_unknown_model_names_the_served_ones(client):
    assert "income" in client.get("/v2/models/incomes").json()["error"]


@pytest.mark.parametrize(
    "header",
    [
        b"x-request-id", b"x-session-id", b"x-request-timeout-seconds", b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id", b"x-request-disconnect-disabled", b"x-raylway-unit", b"traceparent",
    ],
)  # fmt: skip
def test_header_bytes_that_are_not_utf8_get_400(url, header):
    assert raw(url, post(b'{"rows": [' + ROW + b"]}", header + b": \xff\xfe")) == 400


def test_headers_that_control_serve_have_no_effect(client):
    control_headers = {
        "x-request-timeout-seconds": "0",
        "x-session-id": "s",
        "serve_multiplexed_model_id": "m",
        "x-request-disconnect-disabled": "?1",
    }
    for headers in ({}, control_headers, {"x-request-timeout-seconds": "0.000001"}):
        response = client.post(PREDICT, json={"rows": ROWS, "unit": "u"}, headers=headers)
        assert response.status_code == 200


def test_a_too_large_body_is_refused_even_if_it_is_chunked_or_has_not_arrived(client, url):
    def chunks():
        for _ in range(20):
            yield b" " * 10_000

    response = client.post(PREDICT, content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert raw(url, post(b"").replace(b"Content-Length: 0", b"Content-Length: 99999999999")) == 413
    assert client.post(PREDICT, json={"rows": ROWS}).status_code == 200


def test_a_replica_that_was_killed_is_replaced(client, replicas):
    (before,) = replicas("income")
    os.kill(before.pid, signal.SIGKILL)
    deadline = time.monotonic() + 40
    answered = False
    with httpx.Client(base_url=client.base_url, trust_env=False, timeout=20) as retrying:
        while not answered and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):  # the request that the killed replica had
                health = retrying.get("/v2/models/income/ready")
                assert (health.status_code, health.json().get("ready")) in ((200, True), (503, None))
                answered = retrying.post(PREDICT, json={"rows": ROWS}).status_code == 200
            time.sleep(0.1)
    assert answered
    assert [process.pid for process in replicas("income")] != [before.pid]


def test_a_refused_deployment_changes_nothing(client, variants, settings, tmp_path):
    broken = build(tmp_path / "broken", seed=3)
    (broken / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.onnx was changed"):
        deploy.deploy(
            settings, "income", traffic({"champion": DeployedVariant(version="3", weight=1, path=broken)})
        )
    with pytest.raises(UserError, match=r"serving\.port"):
        deploy.deploy(settings.model_copy(update={"port": settings.port + 1}), "income", traffic(variants))
    assert client.get("/v2/models/income").json()["versions"] == ["1", "2"]


def test_a_version_that_no_replica_can_open_leaves_the_previous_ones_serving(
    client, variants, settings, tmp_path, monkeypatch
):
    bundles = open_bundles(variants)
    # This process can open the bundle, but a replica cannot.
    monkeypatch.setattr(deploy, "open_bundles", lambda *_: bundles)
    gone = {"champion": DeployedVariant(version="3", weight=1, path=tmp_path / "gone")}
    with pytest.raises(UserError, match=r"gone: is not a bundle.*keep serving"):
        deploy.deploy(settings, "income", traffic(gone))
    assert client.post(PREDICT, json={"rows": ROWS}).json()["version"] in ("1", "2")
    assert client.get("/v2/health/ready").status_code == 200
    current = read_current_traffic(Audit(), "income").traffic
    assert current.variants["champion"].version == "1", "replicas that start later load the previous version"


LEAVING = """
import gc, time
import ray
from app.cluster.session import session
with session(log_to_driver=False):
    from app.serving.control.replicas import broadcast
    from ray.serve._private.long_poll import LongPollClient
    assert broadcast("income", "income", "state")
    clients = [value for value in gc.get_objects() if isinstance(value, LongPollClient)]
    assert clients
for client in clients:  # as if an answer of the controller had arrived in the meantime
    client.is_running = True
    client.event_loop.call_soon_threadsafe(client._poll_next)
time.sleep(3)
assert not ray.is_initialized()
with session(log_to_driver=False):
    assert broadcast("income", "income", "state", 30)
"""


def test_a_process_that_left_the_cluster_starts_no_new_one_and_can_join_again(url):
    """A thread of Serve in that process keeps polling the controller."""
    process = subprocess.run(
        [sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "127.0.0.2"},
        {"grpc_port": None},
        {"port": 1},
        {"grpc_port": 1},
        {"auth": "local", "host": "0.0.0.0"},
    ],
)
def test_a_second_project_cannot_change_the_frontend_of_the_first(client, variants, settings, changed):
    other = Serving.model_validate({**settings.model_dump(), "auth": "local", **changed})
    with pytest.raises(UserError, match=r"guarded must .* income.* serving\.(host|port|grpc_port) is"):
        deploy.deploy(other, "guarded", traffic(variants))
    assert client.post(PREDICT, json={"rows": ROWS}).status_code == 200
    assert not listens(settings.port, "127.0.0.2")
    assert client.get("/v2/models/guarded/ready").status_code == 404


def test_a_change_of_the_grpc_port_that_fails_changes_nothing(client, grpc, variants, settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        changed = settings.model_copy(update={"grpc_port": taken.getsockname()[1]})
        with pytest.raises(UserError, match=r"must be free.*serving\.grpc_port"):
            deploy.deploy(changed, "income", traffic(variants))
    assert grpc.is_model_ready("income")
    assert gateway_settings.read().frontend.grpc_port == settings.grpc_port
    try:
        deploy.deploy(settings.model_copy(update={"grpc_port": None}), "income", traffic(variants))
        assert not listens(settings.grpc_port)
    finally:
        deploy.deploy(settings, "income", traffic(variants))
    assert client.post(PREDICT, json={"rows": ROWS}).status_code == 200
    assert listens(settings.grpc_port)


def test_models_are_not_listed_if_any_endpoint_requires_tokens(client, variants, settings):
    """This test must be the last one: its endpoint stays until the end of the module."""
    guarded = settings.model_copy(update={"auth": "local"})
    deploy.deploy(guarded, "guarded", traffic({"champion": variants["champion"]}))
    assert client.post(PREDICT, json={"rows": ROWS}).status_code == 200
    assert client.post("/v2/models/guarded/predict", json={"rows": ROWS}).status_code == 401
    for path in ("/", "/v2/health/ready"):
        assert "income" not in client.get(path).text
        assert "guarded" not in client.get(path).text
    deploy.deploy(settings, "income", traffic(variants))
    assert "guarded" not in client.get("/").text, "also if the endpoint without tokens is deployed last"
