import pytest

from app.config import Serving
from app.serving.control.workers import start_workers, stop_abandoned_workers, stop_unused_workers
from app.serving.replica.workers import Worker
from app.serving.traffic import traffic as traffics
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from app.state.audit import Audit
from tests.traffics import place

SERVING = Serving.model_validate(
    {
        "variants": {
            "champion": {"version": "1", "weight": 1},
            "heavy": {"version": "2", "weight": 1, "workers": {"num_cpus": 2, "max_replicas": 3}},
        }
    }
)


def make_traffic(champion="1", heavy="2"):
    return Traffic(
        salt="1",
        policy="weighted",
        variants={
            "champion": DeployedVariant(version=champion, weight=1, path="/bundles/1"),
            "heavy": DeployedVariant(
                version=heavy, weight=1, path=f"/bundles/{heavy}", workers=f"income@{heavy}"
            ),
        },
    )


@pytest.fixture
def audit():
    with Audit() as audit:
        yield audit


def test_only_variants_with_workers_get_an_application(fake_serve):
    start_workers("income", SERVING, make_traffic())
    assert fake_serve.events == [("run", "income@2", None)]
    deployment = fake_serve.bound["income@2"]
    assert deployment.func_or_class is Worker
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3


def test_workers_restart_only_for_another_bundle_or_other_settings(fake_serve):
    def version(serving=SERVING, heavy="2"):
        start_workers("income", serving, make_traffic(heavy=heavy))
        return fake_serve.bound[f"income@{heavy}"].version

    first = version()
    assert version() == first
    assert version(heavy="3") != first
    document = SERVING.model_dump()
    document["variants"]["heavy"]["workers"]["num_cpus"] = 4
    assert version(Serving.model_validate(document)) != first


def test_workers_of_other_versions_are_stopped_and_other_endpoints_keep_theirs(fake_serve, audit):
    place(audit, "income", make_traffic(), SERVING)
    for name in ("income", "income@1", "income@2", "income-two@1"):
        fake_serve.add(name)
    stop_unused_workers(audit, "income")
    assert fake_serve.events == [("delete", "income@1")]


def test_all_workers_of_an_endpoint_without_traffic_are_stopped(fake_serve, audit):
    fake_serve.add("income@1")
    stop_unused_workers(audit, "income")
    assert fake_serve.events == [("delete", "income@1")]


def test_no_worker_is_stopped_if_the_traffic_cannot_be_read(fake_serve, audit):
    audit.add(traffics.TRAFFIC_ACTION, "income", {"of": "an older version"})
    fake_serve.add("income@1")
    stop_unused_workers(audit, "income")
    assert fake_serve.events == []


def test_abandoned_workers_are_not_stopped_while_somebody_changes_the_endpoint(fake_serve, audit):
    fake_serve.add("income@1")
    with traffics.endpoint_lock("income"):
        stop_abandoned_workers(audit, "income")
        assert fake_serve.events == []
    stop_abandoned_workers(audit, "income")
    assert fake_serve.events == [("delete", "income@1")]
