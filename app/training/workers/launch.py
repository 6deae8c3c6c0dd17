"""Ray's trainer, quicker to its first step. Imports little: Ray Train's controller opens it.

Most of the time from `fit()` to the first step goes into starting Python processes and their imports. Ray
gives the controller and each rank a runtime environment of their own, only to pass on flags that our clusters
have anyway, and so a new process each; and it starts helpers that this training has no use for.
"""

from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback, WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

UNUSED = (
    DatasetsCallback,  # each rank reads its rows itself
    ControllerMetricsCallback,  # of checkpoints that Ray writes; ours it does not see
    WorkerMetricsCallback,
    PlacementGroupCleanerCallback,  # the group's places go with the controller anyway
)


class Group(WorkerGroup):
    """Ranks in processes that Ray has ready."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)


class Controller(TrainController):
    """Starts its ranks in such processes."""

    worker_group_cls = Group


class Trainer(DataParallelTrainer):
    """Ray's trainer, with what it does not need left out."""

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, UNUSED)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        controller = ray.remote(num_cpus=0, label_selector=here)(Controller).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
