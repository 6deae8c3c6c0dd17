"""Tokens, TLS, limits, and every port of a cluster that serves."""

import contextlib
import itertools
import os
import pickle
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import psutil
import pytest

from app.cluster.ports import free_ports
from app.config import Serving
from app.serving.control import deploy
from app.serving.control.undeploy import undeploy_all
from app.serving.gateway import issuer
from app.serving.gateway.bounds import MAX_CONCURRENT_REQUESTS
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.records import Records
from tests.bundles import ROWS, build

pytestmark = [
    pytest.mark.integration,
    # Ray Serve's imports raise these.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]

NAME = "guarded"
BASE = f"/v2/models/{NAME}"
PER_S = 20.0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A folder with a certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    sign(folder)
    return folder


def sign(folder) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=raylway", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def serving(certificate):
    ports = free_ports(2)
    return Serving.model_validate(
        {
            "port": ports[0],
            "grpc_port": ports[1],
            "num_cpus": 0.1,
            "variants": {"champion": {"version": "1", "weight": 1}, "other": {"version": "2"}},
            "autoscaling": {"min_replicas": 2, "max_replicas": 2},
            "auth": "local",
            "tls": {"certificate": str(certificate / "cert.pem"), "key": str(certificate / "key.pem")},
            "limits": {"requests_per_s": PER_S, "feedback_per_hour": 5},
        }
    )


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        name: DeployedVariant(version=str(number), weight=weight, path=build(folder / name, seed=number))
        for number, (name, weight) in enumerate({"champion": 1, "other": 0}.items(), start=1)
    }


@pytest.fixture(scope="module")
def url(ray_cluster, serving, variants):
    yield deploy.deploy(serving, NAME, Traffic(salt="1", policy="weighted", variants=variants))
    undeploy_all()


_NUMBERS = itertools.count()


@pytest.fixture
def client(url, certificate):
    """Makes a client for a new principal, with a token of these scopes, or without a token."""
    with contextlib.ExitStack() as clients:

        def make(*scopes: str) -> httpx.Client:
            headers = {}
            if scopes:
                headers["authorization"] = f"Bearer {issuer.issue(f'user-{next(_NUMBERS)}', scopes, 1)}"
            trusted = ssl.create_default_context(cafile=certificate / "cert.pem")
            new = httpx.Client(base_url=url, verify=trusted, headers=headers, timeout=20, trust_env=False)
            return clients.enter_context(new)

        yield make


REQUESTS = [
    ("POST", "/predict", {"rows": ROWS}),
    ("POST", "/versions/1/predict", {"rows": ROWS}),
    ("POST", "/explain", {"rows": ROWS}),
    ("POST", "/infer", {"inputs": []}),
    ("POST", "/feedback", {"request_id": "r", "reward": 1.0}),
    ("GET", "", None),
    ("GET", "/openapi.json", None),
]


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_requests_without_a_token_are_refused(client, method, path, body):
    response = client().request(method, BASE + path, json=body)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert set(response.json()) == {"error", "violations"}


def test_responses_without_a_token_do_not_name_the_model(client):
    for path in ("/", "/v2/models/incomes", "/v2/health/ready", "/v2", "/-/routes"):
        assert NAME not in client().get(path).text


def test_a_token_issued_by_the_command_allows_its_scopes_only(client, raylway):
    done = raylway("token", "ann", "--scopes", f"predict:{NAME},feedback", "--hours", "1")
    assert done.returncode == 0, done.stderr
    ann = client()
    ann.headers["authorization"] = f"Bearer {done.stdout.strip()}"
    response = ann.post(f"{BASE}/predict", json={"rows": ROWS})
    assert response.status_code == 200
    assert ann.post(f"{BASE}/explain", json={"rows": ROWS}).status_code == 403
    wait_until_recorded(response.json()["request_id"])
    feedback = ann.post(f"{BASE}/feedback", json={"request_id": response.json()["request_id"], "reward": 1.0})
    assert (feedback.status_code, feedback.json()["status"]) == (201, "stored")


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (("predict",), {"/predict"}),
        (("predict:another",), set()),
        ((f"explain:{NAME}",), {"/explain"}),
        (("feedback",), {"/feedback"}),
        (("predict", "admin"), {"/predict", "/versions/2/predict"}),
    ],
)
def test_a_token_allows_the_actions_of_its_scopes_only(client, scopes, allowed):
    user, statuses = client(*scopes), {}
    for path in ("/predict", "/explain", "/feedback", "/versions/2/predict"):
        body = {"request_id": f"r-{next(_NUMBERS)}", "reward": 1.0} if path == "/feedback" else {"rows": ROWS}
        statuses[path] = user.post(BASE + path, json=body).status_code
    assert {path for path, status in statuses.items() if status < 300} == allowed
    assert all(status == 403 for path, status in statuses.items() if path not in allowed)


def test_the_scope_admin_may_choose_the_variant(client):
    header = {"x-raylway-variant": "other"}
    admin = client("predict", "admin")
    response = admin.post(f"{BASE}/predict", json={"rows": ROWS}, headers=header)
    assert (response.json()["variant"], response.json()["version"]) == ("other", "2")
    assert client("predict").post(f"{BASE}/predict", json={"rows": ROWS}, headers=header).status_code == 403
    unknown = admin.post(f"{BASE}/predict", json={"rows": ROWS}, headers={"x-raylway-variant": "nobody"})
    assert unknown.status_code == 422


@pytest.mark.parametrize(
    "token",
    [
        "Basic dXNlcjpwYXNz",
        "Bearer x.y.z",
        "Bearer " + "x" * 10_000,
        # alg: none
        "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIiwic2NvcGUiOiJhZG1pbiJ9.",
    ],
)
def test_an_invalid_token_is_refused(client, token):
    response = client().post(f"{BASE}/predict", json={"rows": ROWS}, headers={"authorization": token})
    assert response.status_code == 401


def test_a_principals_rate_limit_covers_all_replicas(client):
    user, other = client("predict"), client("predict")
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        send = lambda _: user.post(f"{BASE}/predict", json={"rows": ROWS[:1]})  # noqa: E731
        responses = list(pool.map(send, range(150)))
    seconds = time.monotonic() - started
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    # A burst of one second's requests, then PER_S per second.
    assert statuses.count(200) <= PER_S * (seconds + 1) + 2
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert other.post(f"{BASE}/predict", json={"rows": ROWS}).status_code == 200, (
        "each principal has its own limit"
    )


def test_requests_without_a_token_whose_bodies_never_arrive_occupy_no_replica(url, client, certificate):
    """There are more such connections than both replicas admit requests at once."""
    host, port = url.removeprefix("https://").split(":")
    trusted = ssl.create_default_context(cafile=certificate / "cert.pem")
    head = f"POST {BASE}/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 40000\r\n\r\n".encode()
    with contextlib.ExitStack() as connections:
        silent = []
        for _ in range(2 * MAX_CONCURRENT_REQUESTS + 12):
            plain = connections.enter_context(socket.create_connection((host, int(port)), timeout=30))
            silent.append(connections.enter_context(trusted.wrap_socket(plain, server_hostname=host)))
            silent[-1].sendall(head + b" " * 30_000)
        user = client("predict")
        statuses = [user.post(f"{BASE}/predict", json={"rows": ROWS}).status_code for _ in range(5)]
        assert statuses == [200] * 5
        assert {connection.recv(12) for connection in silent} == {b"HTTP/1.1 401"}


def wait_until_recorded(*request_ids):
    records, deadline = Records(), time.monotonic() + 30
    while len(records.predictions(NAME, request_ids)) < len(request_ids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records.close()


def test_feedback_is_for_own_predictions_only_and_limited_per_hour(client):
    user, other = client("predict", "feedback"), client("predict", "feedback")
    ids = [f"shared-{number}" for number in range(6)]
    for request_id in ids:
        response = user.post(f"{BASE}/predict", json={"rows": ROWS}, headers={"x-request-id": request_id})
        assert response.status_code == 200
    wait_until_recorded(*ids)

    def send_feedback(sender, request_id, **content):
        response = sender.post(f"{BASE}/feedback", json={"request_id": request_id, **content})
        return response.status_code, response.json().get("status")

    assert send_feedback(other, ids[0], reward=0.0) == (202, "unknown request"), "another's prediction"
    assert send_feedback(user, ids[0], reward=1.0) == (201, "stored")
    assert send_feedback(user, ids[0], reward=1.0) == (200, "stored before")
    assert send_feedback(user, ids[0], reward=0.5)[0] == 409
    for request_id in ids[1:5]:
        assert send_feedback(user, request_id, reward=0.5) == (201, "stored")
    assert [send_feedback(user, ids[5], reward=0.5) for _ in range(2)] == [(202, "quarantined")] * 2
    records = Records()
    assert {f.request_id for f in records.feedback(NAME)} >= set(ids[:5])
    assert [f.content["reward"] for f in records.feedback(NAME) if f.request_id == ids[0]] == [1.0]
    records.close()


def test_plain_http_and_old_tls_are_refused(url, certificate):
    plain = url.replace("https", "http")
    with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False, timeout=5) as http:
        http.get(f"{plain}/v2/health/live").raise_for_status()
    host, port = url.removeprefix("https://").split(":")
    old_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old_tls.maximum_version = ssl.TLSVersion.TLSv1_1
    old_tls.check_hostname, old_tls.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(OSError), socket.create_connection((host, int(port)), timeout=5) as raw:  # noqa: PT011
        old_tls.wrap_socket(raw)


def test_grpc_requires_a_token(url, serving, certificate):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    address = f"127.0.0.1:{serving.grpc_port}"
    with InferenceServerClient(address, ssl=True, root_certificates=str(certificate / "cert.pem")) as triton:
        assert triton.is_server_live()
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            triton.get_model_metadata(NAME)
        token = issuer.issue("ann", ["predict"], 1)
        metadata = triton.get_model_metadata(NAME, headers={"authorization": f"Bearer {token}"})
        assert metadata.name == NAME


def test_a_renewed_certificate_is_served_after_the_next_deployment(url, serving, certificate, variants):
    def presented(port: int) -> str:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=20)

    before = (certificate / "cert.pem").read_text()
    assert presented(serving.port) == presented(serving.grpc_port) == before
    sign(certificate)
    deploy.deploy(serving, NAME, Traffic(salt="1", policy="weighted", variants=variants))
    renewed = (certificate / "cert.pem").read_text()
    assert presented(serving.port) == presented(serving.grpc_port) == renewed != before


READABLE = {"/v2/health/live", "/v2/health/ready", f"{BASE}/ready", "/-/healthz", "/metrics"}
READABLE |= {"/api/gcs_healthz", "/api/local_raylet_healthz"}
"""Paths that answer without a token: health, and on loopback Ray's metrics for Prometheus. (So do the
server's version and the page of the API's documentation; the documentation itself needs a token.)"""
READ_PATHS = [
    "/", "/metrics", "/stats", *READABLE, "/-/routes", "/api/version", "/api/jobs/", "/nodes",
    "/api/serve/applications/", "/logs", "/api/v0/logs", BASE, f"{BASE}/predict", "/api/cluster_status",
    "/api/v0/actors", "/events", "/static/", "/api/gcs_healthz", "/api/local_raylet_healthz",
]  # fmt: skip
WRITE_PATHS = [
    "/predict",
    "/api/jobs/",
    "/api/serve/applications/",
    "/api/data/datasets/x",
    BASE + "/feedback",
]


def harmless(path: str, text: str) -> bool:
    """Whether an answer is health, metrics, or the dashboard's page, which loads its content with a token."""
    return path in READABLE or text.startswith("# HELP") or "<title>Ray Dashboard</title>" in text


class FileOnUnpickling:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return (os.mknod, (str(self._file),))


def test_no_port_of_the_cluster_is_open_without_a_token(url, reach, certificate, tmp_path):
    """Send requests to every port on which a process of the cluster listens: reads and writes over HTTP and
    TLS, and a pickle over gRPC, as Ray's replicas exchange them."""
    from ray.serve.generated.serve_pb2 import ASGIRequest

    listening = {}
    head = psutil.Process(reach.cluster.pid)
    for process in [head, *head.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    ip = connection.laddr.ip.removeprefix("::ffff:")
                    listening[connection.laddr.port] = (ip, " ".join(process.cmdline()))
    assert len(listening) > 8
    # Replicas of Ray Serve listen on all interfaces, for each other's gRPC calls with Ray's token.
    on_other_interfaces = {name for ip, name in listening.values() if ip not in ("127.0.0.1", "::1")}
    assert all("ServeReplica" in name for name in on_other_interfaces)
    answered = []
    pickled = pickle.dumps(FileOnUnpickling(tmp_path / "written"))
    request = ASGIRequest(pickled_request_metadata=pickled, request_args=pickled, request_kwargs=pickled)
    grpc_errors = set()
    for port, (_, name) in sorted(listening.items()):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            try:
                call(request.SerializeToString(), timeout=3)
                answered.append((port, name, "gRPC"))
            except grpc.RpcError as error:
                grpc_errors.add(error.code())
        for scheme in ("http", "https"):
            base = f"{scheme}://127.0.0.1:{port}"
            with httpx.Client(base_url=base, verify=False, trust_env=False, timeout=3) as stranger:
                requests = [("GET", path) for path in READ_PATHS] + [("POST", path) for path in WRITE_PATHS]
                requests += [("PUT", path) for path in WRITE_PATHS] + [
                    ("DELETE", path) for path in WRITE_PATHS
                ]
                for method, path in requests:
                    try:
                        response = stranger.request(method, path)
                    except (httpx.TransportError, httpx.InvalidURL):
                        break  # the port does not speak HTTP or TLS
                    if response.status_code < 400 and not (method == "GET" and harmless(path, response.text)):
                        answered.append((port, name, method, path, response.text[:80]))
    assert not answered
    assert not (tmp_path / "written").exists()
    assert grpc.StatusCode.UNAUTHENTICATED in grpc_errors
