"""Serving a project's variants, and the status of all endpoints. Call these in a session of `app.cluster`."""

from collections.abc import Callable
from typing import Any

from app.cluster import capacity
from app.config import Project
from app.monitoring import deployment as monitor
from app.serving.control import deploy as endpoints
from app.serving.control import status
from app.serving.traffic.traffic import Traffic
from app.state import hooks


def deploy(project: Project, traffic: Traffic, on_wait: Callable[[str | None], None] = lambda _: None) -> str:
    """Serve a project with this traffic and start its monitoring; returns the server's URL.

    `on_wait` is called with a message about what is waited for, or with None. Raises UserError like
    `app.serving.control.deploy.deploy`.
    """
    serving = project.serving
    num_cpus = serving.num_cpus * serving.autoscaling.min_replicas
    setting = "serving.num_cpus x autoscaling.min_replicas"
    on_wait(capacity.current().wait_message(num_cpus, setting, excluding=project.name))
    return endpoints.deploy(serving, project.name, traffic, on_wait, start_monitoring=monitor.start)


def statuses() -> list[dict[str, Any]]:
    """The status of every endpoint as JSON values.

    `watch` is None if the endpoints are not monitored. `hooks` lists the uses of private parts of Ray that
    have no effect on this cluster; it is the same for all endpoints.
    """
    report = monitor.report()
    watch = None
    if report is not None:
        watch = {
            "looked_s_ago": report.round_ended_s_ago,
            "failures": report.num_failures,
            "last_error": report.last_error,
        }
    documents = []
    for endpoint in status.read_endpoints():
        document = endpoint.document()
        fault = report.faults.get(endpoint.name) if report else None
        faults = sorted({*document["faults"], *([fault] if fault else [])})
        documents.append({**document, "faults": faults, "watch": watch, "hooks": list(hooks.reported())})
    return documents
