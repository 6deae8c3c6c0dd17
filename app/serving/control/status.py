"""What the endpoints do at the moment, as their replicas say."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import UserError
from app.serving.names import model_names
from app.serving.replica.meters import WINDOW_S, RequestStats, merge
from app.serving.replica.recorder import RecorderStatus
from app.serving.replica.state import State
from app.serving.traffic import cache
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class EndpointStatus:
    """An endpoint with all of its replicas."""

    name: str
    status: str
    """Ray Serve's, such as RUNNING or UPDATING."""
    traffic: Traffic | None
    """None if it cannot be read, or the endpoint is being taken off."""
    states: Sequence[State]
    """Of each replica that answers."""
    target: int
    """How many replicas there are to be."""
    workers: dict[str, tuple[int, int]]
    """Of each variant with replicas of its own: how many run, and how many there are to be."""
    faults: Sequence[str]
    """Why it does not serve what it should."""

    @property
    def _recordings(self) -> list[RecorderStatus]:
        return [state.recording for state in self.states if state.recording is not None]

    def document(self) -> dict[str, Any]:
        """For programs: seconds, and rates per second over the last minute."""
        recent = merge(state.recent for state in self.states)
        weights = self.traffic.weights if self.traffic else {}
        return {
            "name": self.name,
            "status": self.status,
            "replicas": {"running": len(self.states), "target": self.target},
            "policy": self.traffic.policy if self.traffic else None,
            "variants": {
                name: {
                    "version": variant.version,
                    "weight": variant.weight,
                    "share": weights.get(name, 0.0) / sum(weights.values()),
                    "shadow": variant.shadow,
                    "workers": self.workers.get(name),
                    **_measured(recent.get(name, RequestStats())),
                }
                for name, variant in (self.traffic.variants.items() if self.traffic else ())
            },
            "not_recorded": sum(sum(r.dropped.values()) for r in self._recordings),
            "recording": {
                "dropped": dict(sum((Counter(r.dropped) for r in self._recordings), Counter())),
                "waiting": sum(r.num_waiting for r in self._recordings),
                "waiting_bytes": sum(r.waiting_bytes for r in self._recordings),
                "faults": sorted({r.fault for r in self._recordings if r.fault}),
            },
            "not_shadowed": sum(sum(state.shadows.values()) for state in self.states),
            "faults": list(self.faults),
        }


def _measured(stats: RequestStats) -> dict[str, float | None]:
    if not stats.num_requests:
        return {"requests_per_s": 0.0, "p50_s": None, "p99_s": None, "error_rate": None}
    return {
        "requests_per_s": stats.num_requests / WINDOW_S,
        "p50_s": stats.quantile_s(0.5),
        "p99_s": stats.quantile_s(0.99),
        "error_rate": stats.num_errors / stats.num_requests,
    }


def endpoints() -> list[EndpointStatus]:
    """All of the cluster. Call it in a session of `app.cluster`."""
    from ray import serve

    applications = serve.status().applications
    found = []
    with Audit() as audit:
        for name in model_names(applications):
            holds, fault = _holds(audit, name)
            states = ask_replicas(name, name, "state")
            faults = {
                fault,
                *(state.fault for state in states),
                *(h for state in states for h in state.hooks),
            }
            workers = {
                variant: _counts(applications[deployed.workers], "worker")
                for variant, deployed in (holds.variants.items() if holds else ())
                if deployed.workers in applications
            }
            _, target = _counts(applications[name], name)
            status = str(applications[name].status.value)
            texts = sorted(fault for fault in faults if fault)
            found.append(EndpointStatus(name, status, holds, states, target, workers, texts))
    return found


def _holds(audit: Audit, name: str) -> tuple[Traffic | None, str | None]:
    """The traffic of an endpoint, from the database, or as it is known here; and what is wrong with it."""
    try:
        _, found, fault = cache.read_with_fallback(audit, name)
    except UserError as error:
        return None, str(error)
    return found, fault


def _counts(application: Any, deployment: str) -> tuple[int, int]:
    """Replicas that run, and that there are to be."""
    details = application.deployments.get(deployment)
    if details is None:  # just being deployed
        return 0, 0
    return details.replica_states.get("RUNNING", 0), sum(
        count for state, count in details.replica_states.items() if state != "STOPPING"
    )


def ask_replicas(application: str, deployment: str, method: str) -> list[Any]:
    """The result of a method of each replica; empty if they do not answer in time, or run another version of
    Raylway."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return broadcast(application, deployment, method, TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError):
        return []


def broadcast(application: str, deployment: str, method: str, timeout_s: float | None = None) -> list[Any]:
    """What each replica of a deployment says to a method; from a command, or a thread of a replica's.

    Raises RayError if one dies, and TimeoutError if they take longer.
    """
    from ray.serve.handle import DeploymentHandle

    # Of its own, because it ends here: the threads of one that lives longer than the command's cluster would
    # join whatever cluster they find, and the command would wait for them for ever. And in a loop of its own:
    # by our flags it would be that of the caller, who has none.
    handle: Any = DeploymentHandle(deployment, application)
    handle._init(_run_router_in_separate_loop=True)
    try:
        return handle.broadcast(method).results(timeout_s=timeout_s)
    finally:
        handle.shutdown()


def statuses() -> dict[str, str]:
    """Ray Serve's status of each model's application, such as RUNNING."""
    from ray import serve

    applications = serve.status().applications
    return {name: str(applications[name].status.value) for name in model_names(applications)}
