"""Ray's trainer with a faster start. Imports little, because Ray Train's controller imports it.

Most of the time from `fit()` to the first step goes into starting Python processes and into their imports.
Ray gives the controller and each rank a runtime environment of its own, and with it a new process, only to
set flags that our clusters set anyway. It also starts helper actors that this training does not use.
"""

from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback, WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from app.training.workers.overrides import override

UNUSED_CALLBACKS = (
    DatasetsCallback,  # each rank reads its own rows
    ControllerMetricsCallback,  # measures Ray's checkpoints, not ours
    WorkerMetricsCallback,
    PlacementGroupCleanerCallback,  # the placement group ends with the controller anyway
)


class Group(WorkerGroup):
    """Ranks without a runtime environment, so that they run in processes that Ray has started in advance."""

    @staticmethod
    @override("controller")
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)


class Controller(TrainController):
    """Starts its ranks as a `Group`."""

    worker_group_cls = Group


class Trainer(DataParallelTrainer):
    """Ray's trainer without a runtime environment and without the callbacks that are not used."""

    @override("driver")
    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, UNUSED_CALLBACKS)]

    @override("driver")
    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        this_node = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        controller = ray.remote(num_cpus=0, label_selector=this_node)(Controller).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
