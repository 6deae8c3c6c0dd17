"""Elastic training: how many workers there is room for, and what is done when that changes."""

import logging
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingDecision
from ray.util.placement_group import PlacementGroup, remove_placement_group

from app.training.workers.launch import Trainer

SAVE_TIMEOUT_S = 30
SETTLE_S = 1.0
"""How long what a group had may take to be counted as free."""


class ElasticTrainer(Trainer):
    """A trainer whose elastic group has as many workers as `RoomNow` says."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = RoomNow(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class RoomNow(ElasticScalingPolicy):
    """As many workers as there is room for now.

    Ray's own policy counts all that the nodes have: also what others use, and nodes that are about to be
    taken away, or have been gone for up to 20 s. The group that it starts then finds no place for a minute,
    again and again.
    """

    def __init__(self, scaling_config: Any):
        super().__init__(scaling_config)
        self._nodes: list[str] = []

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._nodes = []
        time.sleep(SETTLE_S)  # the controller itself asks without a pause
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._nodes = [worker.metadata.node_id for worker in worker_group_state.workers]
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """By node, what is free and what this group has; None if Ray cannot tell."""
        state = ray._private.state.state
        try:
            free = state.available_resources_per_node()
            draining = state.get_draining_nodes()
        except Exception as error:  # its control store may be starting again
            logging.getLogger(__name__).warning("the free resources are not known: %s", error)
            return None
        room = {node: resources for node, resources in free.items() if node not in draining}
        for node in self._nodes:
            for name, amount in self.scaling_config._resources_per_worker_not_none.items():
                if node in room:
                    room[node][name] = room[node].get(name, 0.0) + amount
        return room


class Transitions(ControllerCallback, WorkerGroupCallback):
    """Ray Train resizes and restarts by ending the group and starting another."""

    def __init__(self, progress: Any):
        """`progress` is the actor that the ranks listen to."""
        self._progress = progress
        self._places: PlacementGroup | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._places = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._progress.add.remote("runs", True)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._progress.add.remote("runs", False)

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._progress.add.remote("runs", False)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            try:
                ray.get(self._progress.save.remote(), timeout=SAVE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                logging.getLogger(__name__).warning("no checkpoint before the resize; the last one serves")
        if isinstance(current_state, RestartingState) and self._places:
            # For those of a lost node, Ray gives the dead group others, which are then not free.
            remove_placement_group(self._places)
            self._places = None
