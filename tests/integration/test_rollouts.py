"""Changes of an endpoint while clients send requests: weights, versions, shadows, workers."""

import json
import os
import re
import signal
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.cluster.ports import free_ports
from app.config import Serving
from app.monitoring import deployment
from app.serving.control import deploy, replicas, status
from app.serving.control.undeploy import undeploy_all
from app.serving.traffic import routing, traffic
from app.serving.traffic.registered import registered_traffic
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from app.state.records import Records
from tests.bundles import ROWS, build
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    # Ray Serve's imports raise these.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]

NAME = "credit"
PREDICT = f"/v2/models/{NAME}/predict"
BODY = {"rows": ROWS, "unit": "user-17"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {str(number): build(folder / str(number), seed=number) for number in (1, 2, 3)}


def traffic_of(bundles, **variants) -> Traffic:
    """A traffic of variants: `champion=("1", 75)` is version and weight; a third item is further fields."""
    return Traffic(
        salt="test",
        policy="weighted",
        variants={
            name: DeployedVariant(version=version, weight=weight, path=bundles[version], **dict(*more))
            for name, (version, weight, *more) in variants.items()
        },
    )


@pytest.fixture(scope="module")
def serving():
    return Serving.model_validate(
        {
            "port": free_ports(1)[0],
            "num_cpus": 0.1,
            "variants": {"champion": {"version": "1", "weight": 1}},
            "autoscaling": {"min_replicas": 2, "max_replicas": 2},
        }
    )


@pytest.fixture(scope="module")
def both(bundles):
    """Champion and challenger with equal weights."""
    return traffic_of(bundles, champion=("1", 50), challenger=("2", 50))


@pytest.fixture(scope="module")
def url(ray_cluster, serving, both):
    yield deploy.deploy(serving, NAME, both)
    undeploy_all()


@pytest.fixture
def served(url, serving, both):
    """The URL of the endpoint, reset to the variants of `both`."""
    deploy.deploy(serving, NAME, both)
    return url


@contextmanager
def sending_requests(url, per_s=50):
    """Send requests during the block; yields a growing list of their (unit, status, document)."""
    answers, ended = [], threading.Event()

    def send():
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
            number = 0
            while not ended.is_set():
                number += 1
                unit = f"user-{number % 100}"
                response = client.post(PREDICT, json={"rows": ROWS, "unit": unit})
                answers.append((unit, response.status_code, response.json()))
                ended.wait(1 / per_s)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()


def test_a_change_of_weights_takes_effect_without_an_error_or_a_restart(served, both, raylway, replicas):
    before = {p.pid for p in replicas(NAME)}
    assert len(before) == 2
    with sending_requests(served) as answers:
        time.sleep(0.5)
        done = raylway("traffic", NAME, "--champion", "90", "--challenger=10")
        assert done.returncode == 0, done.stderr
        num_before = len(answers)
        time.sleep(0.5)
    assert "challenger: version 2, weight 10" in done.stdout
    assert {status for _, status, _ in answers} == {200}
    old, new = both.weights, {"champion": 90.0, "challenger": 10.0}
    chosen = [
        (document["variant"], routing.choose(unit, "test", old), routing.choose(unit, "test", new))
        for unit, _, document in answers
    ]
    # The request in flight during the change may have either variant.
    assert all(variant == after for variant, _, after in chosen[num_before + 1 :])
    assert all(variant in (first, after) for variant, first, after in chosen)
    assert any(first != after for _, first, after in chosen[num_before + 1 :])
    assert {p.pid for p in replicas(NAME)} == before, "no replica was restarted"
    refused = raylway("traffic", NAME, "--nobody", "1")
    assert (refused.returncode, "there is no variant 'nobody'" in refused.stderr) == (2, True)


def test_two_concurrent_changes_of_weights_are_both_applied(served, raylway):
    processes = []
    threads = [
        threading.Thread(target=lambda change=change: processes.append(raylway("traffic", NAME, *change)))
        for change in (("--champion", "7"), ("--challenger", "3"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.returncode for p in processes] == [0, 0], [p.stderr for p in processes]
    current = traffic.read_current(Audit(), NAME)
    assert current.traffic.weights == {"champion": 7, "challenger": 3}
    assert [state.weights for state in replicas.broadcast(NAME, NAME, "state")] == [
        current.traffic.weights
    ] * 2


def test_undeploying_an_endpoint_leaves_the_others(served, serving, bundles, raylway, replicas):
    application = "other@2"
    small = serving.model_copy(
        update={"autoscaling": serving.autoscaling.model_copy(update={"min_replicas": 1})}
    )
    url = deploy.deploy(
        small, "other", traffic_of(bundles, champion=("1", 1), dark=("2", 0, {"workers": application}))
    )
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        assert client.get("/v2/models/other").status_code == 200
        done = raylway("undeploy", "other")
        assert done.returncode == 0, done.stderr
        assert not replicas("other")
        assert not replicas(application)
        assert client.get("/v2/models/other").status_code == 404
        assert client.post(PREDICT, json=BODY).status_code == 200
    assert traffic.read_current(Audit(), "other") is None
    again = raylway("undeploy", "other")
    assert (again.returncode, again.stderr.strip().splitlines()[-1]) == (
        2, f"error: other is not served; served are: {NAME}"
    )  # fmt: skip
    changed = raylway("traffic", "other", "--champion", "1")
    assert (changed.returncode, "other is not served now" in changed.stderr) == (2, True)


def test_a_version_is_replaced_without_an_error_and_restarted_replicas_serve_the_new_one(
    served, serving, bundles, replicas
):
    before = {p.pid for p in replicas(NAME)}
    expected = Bundle(bundles["3"])
    probabilities = expected.predict(columns_of(expected.schema, ROWS))
    with sending_requests(served) as answers:
        time.sleep(0.5)
        deploy.deploy(serving, NAME, traffic_of(bundles, champion=("3", 1)))
        num_before = len(answers)
        time.sleep(0.5)
    assert {status for _, status, _ in answers} == {200}
    after = [document for _, _, document in answers[num_before + 1 :]]
    assert after
    for document in after:
        assert document["version"] == "3"
        np.testing.assert_allclose(
            [p["probability"] for p in document["predictions"]], probabilities, rtol=1e-6
        )
    assert {p.pid for p in replicas(NAME)} == before
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    with httpx.Client(base_url=served, trust_env=False, timeout=20) as client:
        while time.monotonic() < deadline:
            try:
                response = client.post(PREDICT, json=BODY)
            except httpx.TransportError:
                continue
            if response.status_code == 200:
                break
            assert response.status_code in (429, 503)
            assert response.headers["retry-after"] == "1"
            time.sleep(0.2)
        assert response.json()["version"] == "3"


def test_a_shadow_that_works_hangs_or_is_dead_changes_no_answer(served, serving, both, bundles, replicas):
    def answers_to(num_requests):
        answers = []
        with httpx.Client(base_url=served, trust_env=False, timeout=20) as client:
            for number in range(num_requests):
                headers = {"x-request-id": f"r-{number}-{time.time_ns()}"}
                body = {"rows": ROWS, "unit": f"user-{number}"}
                response = client.post(PREDICT, json=body, headers=headers)
                assert response.status_code == 200
                document = response.json()
                assert document.pop("request_id") == headers["x-request-id"]
                answers.append(document)
        return answers

    alone = answers_to(40)
    application = f"{NAME}@3"
    dark = ("3", 0, {"shadow": True, "workers": application})
    shadowed = traffic_of(bundles, champion=("1", 50), challenger=("2", 50), dark=dark)
    deploy.deploy(serving, NAME, shadowed)
    assert answers_to(40) == alone
    records, deadline = Records(), time.monotonic() + 20
    shadow_predictions = []
    while len(shadow_predictions) < 40 and time.monotonic() < deadline:
        time.sleep(0.5)
        shadow_predictions = [p for p in records.predictions(NAME) if p.role == "shadow"]
    expected = Bundle(bundles["3"])
    probabilities = expected.predict(columns_of(expected.schema, ROWS))
    assert len(shadow_predictions) >= 40
    np.testing.assert_allclose(
        [row["probability"] for row in shadow_predictions[0].answer], probabilities, rtol=1e-5
    )

    (process,) = replicas(application)
    process.suspend()
    assert answers_to(40) == alone, "the shadow hangs"
    process.resume()
    process.kill()
    assert answers_to(40) == alone, "the shadow is dead"
    deploy.deploy(serving, NAME, both)
    assert answers_to(40) == alone
    assert not replicas(application)


def test_workers_of_a_variant_batch_rows_and_end_when_idle(served, serving, bundles, replicas):
    application = f"{NAME}@2"
    heavy = serving.model_validate(
        {
            **serving.model_dump(),
            "variants": {
                "champion": {
                    "version": "2",
                    "weight": 1,
                    "workers": {"min_replicas": 0, "num_cpus": 0.1, "max_batch_rows": 4, "idle_s": 2},
                }
            },
            "autoscaling": {"min_replicas": 2, "max_replicas": 2, "downscale_delay_s": 1},
        }
    )
    deploy.deploy(heavy, NAME, traffic_of(bundles, champion=("2", 1, {"workers": application})))
    bundle = Bundle(bundles["2"])
    expected = bundle.predict(columns_of(bundle.schema, ROWS))
    with httpx.Client(base_url=served, trust_env=False, timeout=60) as client:
        for rows in (1, 3):
            document = client.post(PREDICT, json={"rows": ROWS[:rows]}).json()
            got = [p["probability"] for p in document["predictions"]]
            np.testing.assert_allclose(got, expected[:rows], rtol=1e-5)
        large = client.post(PREDICT, json={"rows": ROWS * 5})
        assert large.status_code == 200, "a request may have more rows than max_batch_rows"
        explained = client.post(f"/v2/models/{NAME}/explain", json={"rows": ROWS[:1]}).json()
        assert set(explained["explanations"][0]["attributions"]) == set(ROWS[0])
        assert replicas(application)
        deadline = time.monotonic() + 60
        while replicas(application) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not replicas(application), "idle workers end"
        assert client.post(PREDICT, json=BODY).status_code == 200


def test_status_reports_the_current_traffic(served, raylway):
    with sending_requests(served, per_s=100):
        time.sleep(2.5)
        done = raylway("status", "--json")
    assert done.returncode == 0, done.stderr
    (endpoint,) = json.loads(done.stdout)
    assert (endpoint["name"], endpoint["status"], endpoint["faults"]) == (NAME, "RUNNING", [])
    assert endpoint["hooks"] == []
    assert endpoint["replicas"] == {"running": 2, "target": 2}
    champion = endpoint["variants"]["champion"]
    assert (champion["version"], champion["share"]) == ("1", 0.5)
    assert champion["requests_per_s"] > 0
    assert 0 < champion["p50_s"] <= champion["p99_s"] < 5
    assert champion["error_rate"] == 0
    text = raylway("status").stdout
    assert "credit: RUNNING, 2 of 2 replicas" in text
    assert "challenger" in text


def _latency(metrics: str, suffix: str, tag: str = "") -> float:
    """The sum, over the endpoint's predict requests, of the latency metric with this suffix."""
    lines = [
        line for line in metrics.splitlines() if line.startswith(f"ray_raylway_request_seconds{suffix}{{")
    ]
    tags = (f'model="{NAME}"', 'action="predict"', tag)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in tags))


def test_the_dashboard_queries_metrics_that_are_exported(served):
    import ray

    queried = set(re.findall(r"\bray_\w+", (ROOT / "configs" / "grafana.json").read_text()))
    assert "ray_raylway_requests_total" in queried
    (node,) = ray.nodes()
    missing, deadline = queried, time.monotonic() + 60
    with sending_requests(served), httpx.Client(trust_env=False, timeout=20) as prometheus:
        while missing and time.monotonic() < deadline:
            time.sleep(1)
            text = prometheus.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics").text
            missing = queried - set(re.findall(r"^(\w+)\{", text, re.MULTILINE))
    assert not missing
    assert _latency(text, "_bucket_total", 'le="+Inf"') == _latency(text, "_count_total") > 0
    assert _latency(text, "_bucket_total", 'le="0.001"') < _latency(text, "_count_total")
    assert 0 < _latency(text, "_sum_total") < 10 * _latency(text, "_count_total")
    (line,) = re.findall(
        rf'^ray_raylway_variant_share\{{.*model="{NAME}".*variant="champion".*\}} (.*)$', text, re.M
    )[:1]
    assert float(line) == 0.5


def test_traffic_shows_the_variants_of_a_past_time(served, serving, both, bundles, raylway):
    before = time.time()
    time.sleep(1.1)
    deploy.deploy(serving, NAME, traffic_of(bundles, champion=("3", 1)))
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before))
    then, now = raylway("traffic", NAME, "--at", at), raylway("traffic", NAME)
    assert "champion: version 1, weight 50" in then.stdout
    assert "champion: version 3, weight 1" in now.stdout
    audited = raylway("audit", NAME)
    assert audited.returncode == 0
    entries = Audit().entries(NAME)
    assert entries[-1].action == traffic.TRAFFIC_ACTION
    assert entries[-1].details["variants"]["champion"]["version"] == "3"


def test_an_endpoint_with_follow_serves_the_promoted_version(served, serving, raylway, tmp_path):
    from app.monitoring import follow
    from app.registry import versions
    from tests.versions import registered

    for number in (1, 2):
        path = build(tmp_path / str(number), seed=number)
        registered(NAME, path, str(number))
    following = Serving.model_validate(
        {
            **serving.model_dump(),
            "follow": True,
            "variants": {"champion": {"version": "champion", "weight": 1}},
        }
    )
    deploy.deploy(following, NAME, registered_traffic(NAME, following)[0], start_monitoring=deployment.start)
    with sending_requests(served) as answers:
        done = raylway("promote", NAME, versions.CHALLENGER)
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 30
        while answers[-1][2]["version"] != "2" and time.monotonic() < deadline:
            time.sleep(0.2)
    assert answers[-1][2]["version"] == "2"
    assert {status for _, status, _ in answers} == {200}
    # The promotion's last entry may come after the traffic that follows it.
    newest = [entry for entry in Audit().entries(NAME) if entry.action == traffic.TRAFFIC_ACTION][-1]
    assert newest.who == follow.AUTHOR
    assert [endpoint.faults for endpoint in status.read_endpoints()] == [[]]
