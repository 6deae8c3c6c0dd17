"""Elastic training: before the group grows or shrinks, what it has learnt is saved. Imports little."""

import logging
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

SAVE_TIMEOUT_S = 30


class CheckpointBeforeResize(ControllerCallback):
    """Ray Train resizes by ending the group and starting another: have it write a checkpoint first."""

    def __init__(self, progress: Any):
        """`progress` is the actor that the ranks listen to."""
        self._progress = progress

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            try:
                ray.get(self._progress.save.remote(), timeout=SAVE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                logging.getLogger(__name__).warning("no checkpoint before the resize; the last one serves")
