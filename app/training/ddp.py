"""torch.distributed as a backend of Ray Train: Ray's own, told which network interface to use."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from app.training.horovod import use_interface


@dataclass
class DdpConfig(TorchConfig):
    """Given as `backend_config` to `DataParallelTrainer`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return DdpBackend


class DdpBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        ray.get([worker_group.execute_single_async(rank, use_interface) for rank in range(len(worker_group))])
        super().on_start(worker_group, backend_config)
