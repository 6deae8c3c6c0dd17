import pytest

from app.errors import UserError
from app.serving.control.applications import create_deployment, run_application
from app.serving.names import ROOT
from app.serving.replica.workers import Worker

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
Traceback (most recent call last):
  File "x.py", line 1, in __init__
    require()
app.errors.UserError: model.onnx was changed
"""


def version(inputs):
    return create_deployment(Worker, "worker", inputs).version


def test_the_version_of_a_deployment_depends_on_its_inputs():
    assert version(["a", 1]) == version(["a", 1])
    assert version(["a", 1]) != version(["a", 2])
    assert version({"x": 1, "y": 2}) == version({"y": 2, "x": 1})


def test_a_deployment_has_the_options_of_serve():
    deployment = create_deployment(Worker, "worker", [], ray_actor_options={"num_cpus": 2})
    assert (deployment.name, deployment.ray_actor_options["num_cpus"]) == ("worker", 2)


def test_an_application_runs_on_its_route(fake_serve):
    run_application(create_deployment(Worker, "worker", []).bind(), "income@1", "worker", None)
    assert fake_serve.events == [("run", "income@1", None)]


def test_the_reason_why_an_application_cannot_start_is_in_the_error(fake_serve):
    fake_serve.errors[ROOT] = TRACEBACK
    with pytest.raises(UserError, match=r"could not start Raylway: model\.onnx was changed\. Replicas"):
        run_application(create_deployment(Worker, "worker", []).bind(), ROOT, "worker", "/")
