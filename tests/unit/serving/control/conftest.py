"""Ray Serve as the control functions see it, without a cluster."""

from types import SimpleNamespace

import pytest
from ray import serve


def application(deployment, status="RUNNING", message="", **replica_states):
    """Serve's status of an application with one deployment."""
    details = SimpleNamespace(message=message, replica_states=replica_states or {"RUNNING": 1})
    return SimpleNamespace(status=SimpleNamespace(value=status), deployments={deployment: details})


class FakeServe:
    """Keeps the running applications, and the calls that changed them."""

    def __init__(self):
        self.applications = {}
        self.events = []
        """Names of the functions that were called, with the application."""
        self.bound = {}
        """What each application runs."""
        self.errors = {}
        """Message with which an application fails to start."""

    def add(self, name, deployment=None, **replica_states):
        self.applications[name] = application(deployment or name, **replica_states)

    def status(self):
        return SimpleNamespace(applications=dict(self.applications))

    def run(self, bound, name, route_prefix):
        deployment = bound._bound_deployment.name
        if name in self.errors:
            self.applications[name] = application(deployment, "DEPLOY_FAILED", self.errors[name])
            raise RuntimeError(f"Deploying application {name} failed.")
        self.events.append(("run", name, route_prefix))
        self.bound[name] = bound._bound_deployment
        self.add(name, deployment)

    def delete(self, name):
        self.events.append(("delete", name))
        self.applications.pop(name, None)

    def shutdown(self):
        self.events.append(("shutdown",))
        self.applications.clear()


@pytest.fixture
def fake_serve(monkeypatch):
    fake = FakeServe()
    for name in ("status", "run", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, getattr(fake, name))
    return fake
