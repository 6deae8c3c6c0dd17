"""torch.distributed as a backend of Ray Train that, unlike Ray's, listens only on the cluster's interface."""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch import distributed

from app.training.workers.horovod import JOIN_TIMEOUT_S, releasing_resources, use_cluster_interface


@dataclass
class DdpConfig(TorchConfig):
    """A `backend_config` for `DataParallelTrainer`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return DdpBackend


class DdpBackend(_TorchBackend):
    """Runs in the Train controller: connects each new group of workers."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with releasing_resources(worker_group):
            address, port = worker_group.execute_single(0, _start_store)
            size = len(worker_group)
            ray.get(
                [
                    worker_group.execute_single_async(
                        rank, _join, backend_config.backend, address, port, rank, size
                    )
                    for rank in range(size)
                ]
            )


_store: distributed.TCPStore
"""The store through which the ranks find each other, on rank 0. This reference keeps it alive."""


def _start_store() -> tuple[str, int]:
    """Start the store on rank 0 and return its address and port."""
    global _store
    address = ray.util.get_node_ip_address()
    listener = socket.create_server((address, 0))  # by default, the store listens on every interface
    port = listener.getsockname()[1]
    _store = distributed.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return address, port


def _join(backend: str, address: str, port: int, rank: int, size: int) -> None:
    """Join the process group, on each rank."""
    use_cluster_interface()
    _set_torch_distributed_env_vars()
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    store = distributed.TCPStore(address, port, is_master=False, timeout=timeout)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
