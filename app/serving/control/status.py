"""The status of endpoints, from Ray Serve and from the replicas."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.errors import UserError
from app.serving.control.replicas import try_broadcast
from app.serving.names import model_names
from app.serving.replica.meters import WINDOW_S, RequestStats, merge
from app.serving.replica.recorder import RecorderStatus
from app.serving.replica.state import State
from app.serving.traffic import cache
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit


class NumReplicas(NamedTuple):
    """Number of replicas of a deployment."""

    running: int
    target: int
    """Number of replicas that Serve keeps or starts; those that stop are not counted."""


@dataclass(frozen=True)
class EndpointStatus:
    """The status of an endpoint with all its replicas."""

    name: str
    status: str
    """Ray Serve's status of the application, such as RUNNING or UPDATING."""
    traffic: Traffic | None
    """Current traffic; None if it cannot be read, or the endpoint is being removed."""
    states: Sequence[State]
    """States of the replicas that answered."""
    target_num_replicas: int
    workers: dict[str, NumReplicas]
    """Number of workers of each variant that has some."""
    faults: Sequence[str]
    """Reasons why the endpoint does not serve its current traffic, or not as fast as it should."""

    @property
    def _recorders(self) -> list[RecorderStatus]:
        return [state.recording for state in self.states if state.recording is not None]

    def document(self) -> dict[str, Any]:
        """The status as JSON values: durations in seconds, and rates per second over the last minute."""
        recent = merge(state.recent for state in self.states)
        weights = self.traffic.weights if self.traffic else {}
        return {
            "name": self.name,
            "status": self.status,
            "replicas": {"running": len(self.states), "target": self.target_num_replicas},
            "policy": self.traffic.policy if self.traffic else None,
            "variants": {
                name: {
                    "version": variant.version,
                    "weight": variant.weight,
                    "share": weights.get(name, 0.0) / sum(weights.values()),
                    "shadow": variant.shadow,
                    "workers": self.workers.get(name),
                    **_measurements(recent.get(name, RequestStats())),
                }
                for name, variant in (self.traffic.variants.items() if self.traffic else ())
            },
            "not_recorded": sum(sum(recorder.dropped.values()) for recorder in self._recorders),
            "recording": {
                "dropped": dict(sum((Counter(recorder.dropped) for recorder in self._recorders), Counter())),
                "waiting": sum(recorder.num_waiting for recorder in self._recorders),
                "waiting_bytes": sum(recorder.waiting_bytes for recorder in self._recorders),
                "faults": sorted({recorder.fault for recorder in self._recorders if recorder.fault}),
            },
            "not_shadowed": sum(sum(state.shadows.values()) for state in self.states),
            "faults": list(self.faults),
        }


def read_endpoints() -> list[EndpointStatus]:
    """The status of every endpoint of the cluster. Call it in a session of `app.cluster`."""
    from ray import serve

    applications = serve.status().applications
    with Audit() as audit:
        return [_read_endpoint(audit, name, applications) for name in model_names(applications)]


def application_statuses() -> dict[str, str]:
    """Ray Serve's status of each model's application, such as RUNNING."""
    from ray import serve

    applications = serve.status().applications
    return {name: str(applications[name].status.value) for name in model_names(applications)}


def _read_endpoint(audit: Audit, name: str, applications: Any) -> EndpointStatus:
    try:
        _, traffic, traffic_fault = cache.read_with_fallback(audit, name)
    except UserError as error:
        traffic, traffic_fault = None, str(error)
    states = try_broadcast(name, name, "state")
    faults = {traffic_fault, *(state.fault for state in states)}
    faults.update(fault for state in states for fault in state.hook_faults)
    return EndpointStatus(
        name=name,
        status=str(applications[name].status.value),
        traffic=traffic,
        states=states,
        target_num_replicas=_num_replicas(applications[name], name).target,
        workers={
            variant: _num_replicas(applications[deployed.workers], "worker")
            for variant, deployed in (traffic.variants.items() if traffic else ())
            if deployed.workers in applications
        },
        faults=sorted(fault for fault in faults if fault),
    )


def _num_replicas(application: Any, deployment: str) -> NumReplicas:
    """Number of replicas of a deployment, from Serve's status of its application."""
    details = application.deployments.get(deployment)
    if details is None:  # the application has just been created
        return NumReplicas(0, 0)
    counts = details.replica_states
    target = sum(count for state, count in counts.items() if state != "STOPPING")
    return NumReplicas(running=counts.get("RUNNING", 0), target=target)


def _measurements(stats: RequestStats) -> dict[str, float | None]:
    if not stats.num_requests:
        return {"requests_per_s": 0.0, "p50_s": None, "p99_s": None, "error_rate": None}
    return {
        "requests_per_s": stats.num_requests / WINDOW_S,
        "p50_s": stats.quantile_s(0.5),
        "p99_s": stats.quantile_s(0.99),
        "error_rate": stats.num_errors / stats.num_requests,
    }
