"""Elastic training: the number of workers of a group, and the checkpoint before it is resized."""

import logging
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingDecision
from ray.util.placement_group import PlacementGroup, remove_placement_group

from app.training.workers.launch import Trainer
from app.training.workers.overrides import Caller, not_called, override

SAVE_TIMEOUT_S = 30
"""Maximum time that a resize waits for the checkpoint that precedes it."""
RELEASE_S = 1.0
"""Time until Ray counts the resources of a group that has ended as free."""


class ElasticTrainer(Trainer):
    """A trainer whose elastic group is sized by `FreeResources`."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = FreeResources(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class FreeResources(ElasticScalingPolicy):
    """Sizes a group by the resources that are free now.

    Ray's own policy counts all resources of the nodes: also those that other commands use, and those of nodes
    that are about to be taken away or have been gone for up to 20 s. It would start a group that has no room,
    wait for a minute, and try the same again.
    """

    def __init__(self, scaling_config: Any):
        super().__init__(scaling_config)
        self._worker_nodes: list[str] = []
        """Node id of each worker of the running group."""

    @override("elastic controller")
    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._worker_nodes = []
        time.sleep(RELEASE_S)  # the controller calls this in a loop without a pause
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._worker_nodes = [worker.metadata.node_id for worker in worker_group_state.workers]
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    @override("elastic controller")
    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Sum of the free resources and those of this group, by node; None if Ray does not answer."""
        state = ray._private.state.state
        try:
            free = state.available_resources_per_node()
            draining = state.get_draining_nodes()
        except Exception:  # for example while Ray's control store restarts
            logging.getLogger(__name__).warning(
                "Ray does not report the free resources; the group keeps its size", exc_info=True
            )
            return None
        reserved = {node: resources for node, resources in free.items() if node not in draining}
        for node in self._worker_nodes:
            for name, amount in self.scaling_config._resources_per_worker_not_none.items():
                if node in reserved:
                    reserved[node][name] = reserved[node].get(name, 0.0) + amount
        return reserved


class Transitions(ControllerCallback, WorkerGroupCallback):
    """Reports when a group starts and ends, saves before a resize, and cleans up before a restart.

    For a resize and for a restart, Ray Train ends the group and starts another.
    """

    def __init__(self, progress: Any, is_elastic: bool):
        """`progress` is the actor that the ranks report to."""
        self._progress = progress
        self._callers: list[Caller] = ["controller"]
        if is_elastic:
            self._callers.append("elastic controller")
        self._placement: PlacementGroup | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        state = worker_group.get_worker_group_state()
        self._placement = state.placement_group_handle.placement_group
        self._progress.report.remote("running", True)
        self._progress.report.remote("not called", not_called(*self._callers))

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._progress.report.remote("running", False)

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._progress.report.remote("running", False)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            try:
                ray.get(self._progress.save.remote(), timeout=SAVE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                logging.getLogger(__name__).warning(
                    "no checkpoint within %g s before the resize; training resumes from the last one",
                    SAVE_TIMEOUT_S,
                )
        if isinstance(current_state, RestartingState) and self._placement:
            # Ray moves the bundles of a lost node to another one, where they would reserve resources for the
            # dead group.
            remove_placement_group(self._placement)
            self._placement = None
