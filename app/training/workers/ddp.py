"""torch.distributed as a backend of Ray Train: as Ray's own, but on the cluster's interface alone."""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch import distributed

from app.training.workers.horovod import JOIN_TIMEOUT_S, giving_back, use_interface


@dataclass
class DdpConfig(TorchConfig):
    """Given as `backend_config` to `DataParallelTrainer`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return DdpBackend


class DdpBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with giving_back(worker_group):
            place = worker_group.execute_single(0, _serve)
            size = len(worker_group)
            arguments = [(backend_config.backend, *place, rank, size) for rank in range(size)]
            ray.get([worker_group.execute_single_async(a[-2], _join, *a) for a in arguments])


_store: distributed.TCPStore
"""On rank 0: serves the rendezvous for as long as the process lives."""


def _serve() -> tuple[str, int]:
    """On rank 0: start the rendezvous and return its address; left to itself, it listens everywhere."""
    global _store
    address = ray.util.get_node_ip_address()
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    _store = distributed.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return address, port


def _join(backend: str, address: str, port: int, rank: int, size: int) -> None:
    """On every rank: become one."""
    use_interface()
    _set_torch_distributed_env_vars()
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    store = distributed.TCPStore(address, port, is_master=False, timeout=timeout)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
