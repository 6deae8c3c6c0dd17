"""CPUs of the cluster: how many are free, who holds the others, and how many to claim. Needs Ray."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import UserError

MIN_SHARE = 0.01
"""Ray counts CPUs to four digits; a share is rounded down to two."""
REPLICA = "ServeReplica:"
"""How the class of a Serve replica's actor begins; then come its application and deployment."""
APART = "@"
"""Between a model's name and a version, in the name of the application of the version's own workers."""


@dataclass(frozen=True)
class Capacity:
    """What the cluster has at one moment."""

    total: float
    free: float
    endpoints: Mapping[str, float]
    """CPUs that each endpoint's replicas hold: they come back only when it is taken off."""
    grows: bool
    """Whether an autoscaler adds nodes when there is no room."""

    def room(self, besides: str = "") -> float:
        """CPUs that endpoints leave to others; one of them, `besides`, is not counted."""
        return self.total - sum(cpus for name, cpus in self.endpoints.items() if name != besides)

    def holders(self) -> str:
        """Who holds CPUs, in words."""
        named = [f"endpoint {name} {cpus:g}" for name, cpus in sorted(self.endpoints.items())]
        others = self.total - self.free - sum(self.endpoints.values())
        if others > MIN_SHARE:
            named.append(f"other commands {others:g}")
        return ", ".join(named) or "nobody"

    def wait(self, num_cpus: float, setting: str, besides: str = "") -> str | None:
        """What a command waits for until it has so many CPUs, in words; None if they are free now.

        Raises UserError, which names the setting to lower, if it would wait for ever.
        """
        if not self.grows and self.total < num_cpus:
            raise UserError(
                f"{setting} asks for {num_cpus:g} CPUs, but the cluster has {self.total:g}; lower it with "
                "--set, or use a larger cluster"
            )
        if not self.grows and self.room(besides) < num_cpus:
            raise UserError(
                f"{setting} asks for {num_cpus:g} CPUs, but endpoints leave {self.room(besides):g} of the "
                f"cluster's {self.total:g} ({self.holders()}); serve with a smaller serving.num_cpus, take "
                "an endpoint off, or use a larger cluster"
            )
        free = self.free + self.endpoints.get(besides, 0.0)
        if free + MIN_SHARE / 2 >= num_cpus:
            return None
        return (
            f"waiting for {num_cpus:g} CPUs: {free:g} of {self.total:g} are free (held by: "
            f"{self.holders()}); Ctrl-C ends the command"
        )

    def share(self, num_cpus: float, count: int, setting: str) -> tuple[float, str | None]:
        """How many CPUs each of `count` processes claims, at most `num_cpus`, and what to tell the user.

        Fewer than `num_cpus` where endpoints leave fewer: processes then share cores. Raises UserError if
        the whole cluster has too few, or endpoints leave none.
        """
        room = self.room()
        if self.grows or room >= num_cpus * count or self.total < num_cpus * count:
            return num_cpus, self.wait(num_cpus * count, setting)
        share = math.floor(100 * room / count) / 100
        if share < MIN_SHARE:
            self.wait(num_cpus * count, setting)  # raises
        note = (
            f"endpoints leave {room:g} of {self.total:g} CPUs ({self.holders()}): each of {count} workers "
            f"claims {share:g} instead of {num_cpus:g}, and is slower"
        )
        waiting = self.wait(share * count, setting)
        return share, f"{note}; {waiting}" if waiting else note


def now() -> Capacity:
    """What the cluster has now."""
    import ray

    total, free = (r.get("CPU", 0.0) for r in (ray.cluster_resources(), ray.available_resources()))
    grows = bool(ray._private.state.state.get_max_resources_from_cluster_config())
    return Capacity(total, free, _endpoints(), grows)


def _endpoints() -> dict[str, float]:
    """By model; the workers of a version are its model's."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    held: Counter[str] = Counter()
    for row in state._connect_and_get_accessor().get_actor_table(None, "ALIVE"):
        actor = ActorTableData.FromString(row)
        if actor.class_name.startswith(REPLICA) and actor.required_resources.get("CPU"):
            application = actor.class_name.removeprefix(REPLICA).split(":")[0]
            held[application.split(APART)[0]] += actor.required_resources["CPU"]
    return dict(held)
