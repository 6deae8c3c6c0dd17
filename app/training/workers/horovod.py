"""Horovod as a backend of Ray Train V2 (Ray's own was dropped with V1).

The controller starts Horovod's rendezvous server and tells every worker its place; `hvd.init()` in the
training function then finds the other ranks through Gloo.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

JOIN_TIMEOUT_S = 120
"""How long a rank waits for the others to come to the rendezvous."""


@dataclass
class HorovodConfig(BackendConfig):
    """Given as `backend_config` to `ray.train.v2.api.data_parallel_trainer.DataParallelTrainer`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return HorovodBackend


class HorovodBackend(Backend):
    """Lives in the Train controller; one rendezvous server for each worker group that it starts."""

    _server: Any = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        self._stop()  # of a group that died without a shutdown
        with giving_back(worker_group):
            places = slots(worker_group.execute(_node_id))
            address = ray.util.get_node_ip_address()
            self._server = _serve(address, places)
            rendezvous = {
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(self._server.server_port),
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
                "HOROVOD_GLOO_TIMEOUT_SECONDS": str(JOIN_TIMEOUT_S),
            }
            ray.get(
                [
                    worker_group.execute_single_async(
                        rank, _set_environment, {**place.environment(), **rendezvous}
                    )
                    for rank, place in enumerate(places)
                ]
            )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextmanager
def giving_back(worker_group: Any) -> Iterator[None]:
    """If the block fails, give back the places of the group: Ray would keep them from the next one."""
    try:
        yield
    except BaseException:
        worker_group.get_worker_group_state().shutdown()
        raise


@dataclass(frozen=True)
class Slot:
    """A rank's place: among all ranks, on its node (local), and among those with its local rank (cross)."""

    hostname: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int

    def environment(self) -> dict[str, str]:
        """What `hvd.init()` reads."""
        return {f"HOROVOD_{name.upper()}": str(value) for name, value in vars(self).items()}


def slots(nodes: list[str]) -> list[Slot]:
    """The place of each rank, given the id of the node that it runs on."""
    local_sizes = Counter(nodes)
    order = list(local_sizes)  # nodes by their first rank
    seen: Counter[str] = Counter()
    places = []
    for rank, node in enumerate(nodes):
        local_rank = seen[node]
        seen[node] += 1
        peers = [n for n in order if local_sizes[n] > local_rank]
        places.append(
            Slot(node, rank, len(nodes), local_rank, local_sizes[node], peers.index(node), len(peers))
        )
    return places


def _serve(address: str, places: list[Slot]) -> Any:
    """Horovod's rendezvous server, bound to the cluster's interface alone.

    It takes unauthenticated writes, so it is not for the world, and it lives no longer than the worker
    group. Only the Gloo path uses it, which stores raw bytes; nothing here unpickles what it holds.
    """
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(places)
    threading.Thread(target=server.serve_forever, name="horovod-rendezvous", daemon=True).start()
    return server


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _set_environment(variables: dict[str, str]) -> None:
    """On a worker: its place among the ranks."""
    os.environ.update(variables)
    use_interface()


def use_interface() -> None:
    """On a worker: have Gloo listen on the network interface that has the node's address, and no other."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ["HOROVOD_GLOO_IFACE"] = os.environ["GLOO_SOCKET_IFNAME"] = name
