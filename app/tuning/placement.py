"""Where the trials of a sweep run: the resources that each claims, and how many run at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray
from ray import tune

from app.cluster import capacity
from app.config import Choice, Int
from app.errors import UserError
from app.training.workers.fit import resources
from app.tuning.space import Space


@dataclass(frozen=True)
class Placement:
    """The resources of a sweep's trials."""

    claim: tune.PlacementGroupFactory
    """Resources that Tune reserves for a trial's process."""
    cores_per_trial: float
    """CPUs of a trial, including those of its workers."""
    max_concurrent: int
    """Number of trials that may run at once."""
    in_process: bool
    """Whether a trial trains in its own process, rather than in workers of Ray Train."""


def place(space: Space, *, trials_prepare: bool, on_note: Callable[[str], None]) -> Placement:
    """Decide the placement of a sweep's trials.

    `trials_prepare` says whether each trial prepares its own data. `on_note` receives a line if the trials
    have to wait. Raises UserError if the cluster has no room for one trial.
    """
    num_workers = _max_workers(space)
    worker_resources, note = resources(space.base, num_workers)
    if note:
        on_note(note)
    cores = num_workers * worker_resources["CPU"]
    in_process = num_workers == 1
    if not in_process:
        # Ray Train places the workers; the trial's process only waits for them. Tune refuses an empty claim.
        claim = {"memory": 1.0}
    else:
        claim = _leaving_a_cpu(worker_resources) if trials_prepare else worker_resources
    max_concurrent = space.sweep.concurrent or _max_concurrent(cores, worker_resources, num_workers)
    return Placement(tune.PlacementGroupFactory([claim]), cores, max_concurrent, in_process)


def _max_workers(space: Space) -> int:
    """The largest number of workers that any trial has."""
    parameter = space.sweep.space.get("training.num_workers")
    if isinstance(parameter, Choice):
        return max(max(v) if isinstance(v, list) else v for v in parameter.values)
    if isinstance(parameter, Int):
        return parameter.high
    return space.base.training.max_workers


def _leaving_a_cpu(worker_resources: Mapping[str, float]) -> dict[str, float]:
    """A claim smaller than `worker_resources`, with which the trials leave one CPU of each node free.

    A trial that prepares data waits for Ray Data's tasks. If the trials claimed every CPU, these tasks would
    wait forever.
    """
    smallest_node = min(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])
    current = capacity.current()
    cpus = max(1.0, smallest_node - (current.total - current.left_by_endpoints()))
    return {**worker_resources, "CPU": worker_resources["CPU"] * max(0.0, 1 - 1 / cpus)}


def _max_concurrent(cores: float, worker_resources: Mapping[str, float], num_workers: int) -> int:
    """Number of trials that the cluster has room for. Raises UserError if it has none."""
    total = ray.cluster_resources()
    limits = [int(capacity.current().left_by_endpoints() / cores + 1e-9)]
    if "GPU" in worker_resources:
        limits.append(int(total.get("GPU", 0.0) / (num_workers * worker_resources["GPU"]) + 1e-9))
    if min(limits) < 1:
        raise UserError(
            f"a trial takes {cores:g} CPUs ({num_workers} workers), but the cluster has "
            f"{total.get('CPU', 0):g}; lower training.num_workers or training.num_cpus"
        )
    return min(limits)
