"""CPUs of the cluster: how many are free, in use, and available to a command. Needs Ray."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import UserError

MIN_CPUS = 0.01
"""Minimum number of CPUs that a worker claims. Ray counts CPUs to four decimals; claims are rounded down to
two."""
REPLICA_CLASS_PREFIX = "ServeReplica:"
"""Start of the actor class name of every Serve replica; the application and the deployment follow."""
WORKERS_SEPARATOR = "@"
"""Character between the model and the version in the name of the application of a version's workers."""


@dataclass(frozen=True)
class Capacity:
    """CPUs of the cluster at one moment."""

    total: float
    free: float
    endpoints: Mapping[str, float]
    """CPUs of each endpoint's replicas. They become free only when the endpoint is undeployed."""
    autoscales: bool
    """Whether an autoscaler adds nodes when CPUs are short."""

    def left_by_endpoints(self, excluding: str = "") -> float:
        """CPUs that no endpoint has; those of the endpoint `excluding` count as free."""
        return self.total - sum(cpus for name, cpus in self.endpoints.items() if name != excluding)

    def usage(self) -> str:
        """The CPUs of each endpoint and of all other commands, as text."""
        parts = [f"endpoint {name} {cpus:g}" for name, cpus in sorted(self.endpoints.items())]
        others = self.total - self.free - sum(self.endpoints.values())
        if others > MIN_CPUS:
            parts.append(f"other commands {others:g}")
        return ", ".join(parts) or "nothing"

    def wait_message(self, num_cpus: float, setting: str, excluding: str = "") -> str | None:
        """A message if fewer than `num_cpus` are free now, else None.

        CPUs of the endpoint `excluding` count as free. Raises UserError, which names the key `setting` to
        lower, if `num_cpus` can never become free.
        """
        if not self.autoscales and self.total < num_cpus:
            raise UserError(
                f"{setting} needs {num_cpus:g} CPUs, but the cluster has {self.total:g}; lower it with "
                "--set, or use a larger cluster"
            )
        left = self.left_by_endpoints(excluding)
        if not self.autoscales and left < num_cpus:
            raise UserError(
                f"{setting} needs {num_cpus:g} CPUs, but endpoints leave {left:g} of the cluster's "
                f"{self.total:g} ({self.usage()}); serve with a smaller serving.num_cpus, undeploy an "
                "endpoint, or use a larger cluster"
            )
        free = self.free + self.endpoints.get(excluding, 0.0)
        if free + MIN_CPUS / 2 >= num_cpus:
            return None
        return (
            f"waiting for {num_cpus:g} CPUs: {free:g} of {self.total:g} are free (in use: {self.usage()}); "
            "Ctrl-C ends the command"
        )

    def cpus_per_worker(self, num_cpus: float, num_workers: int, setting: str) -> tuple[float, str | None]:
        """CPUs that each of `num_workers` claims, at most `num_cpus`, and a message for the user or None.

        If endpoints leave fewer, each worker claims less than `num_cpus`, and the workers share cores. Raises
        UserError, which names `setting`, if the whole cluster has too few CPUs, or endpoints leave none.
        """
        left = self.left_by_endpoints()
        if self.autoscales or left >= num_cpus * num_workers or self.total < num_cpus * num_workers:
            return num_cpus, self.wait_message(num_cpus * num_workers, setting)
        claim = math.floor(100 * left / num_workers) / 100
        if claim < MIN_CPUS:
            self.wait_message(num_cpus * num_workers, setting)  # raises UserError
        note = (
            f"endpoints leave {left:g} of {self.total:g} CPUs ({self.usage()}): each of {num_workers} "
            f"workers claims {claim:g} instead of {num_cpus:g}, and is slower"
        )
        waiting = self.wait_message(claim * num_workers, setting)
        return claim, f"{note}; {waiting}" if waiting else note


def current() -> Capacity:
    """The capacity of the cluster that this process is connected to."""
    import ray

    total, free = (r.get("CPU", 0.0) for r in (ray.cluster_resources(), ray.available_resources()))
    autoscales = bool(ray._private.state.state.get_max_resources_from_cluster_config())
    return Capacity(total, free, _endpoint_cpus(), autoscales)


def _endpoint_cpus() -> dict[str, float]:
    """CPUs of Serve's replicas, by model; workers of a version count for their model."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    cpus: Counter[str] = Counter()
    for row in state._connect_and_get_accessor().get_actor_table(None, "ALIVE"):
        actor = ActorTableData.FromString(row)
        if actor.class_name.startswith(REPLICA_CLASS_PREFIX) and actor.required_resources.get("CPU"):
            application = actor.class_name.removeprefix(REPLICA_CLASS_PREFIX).split(":")[0]
            cpus[application.split(WORKERS_SEPARATOR)[0]] += actor.required_resources["CPU"]
    return dict(cpus)
