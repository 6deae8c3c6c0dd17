"""Horovod as a backend of Ray Train V2. Ray's own Horovod backend existed only in V1.

The controller starts Horovod's rendezvous server and sets each worker's place in its environment;
`hvd.init()` in the training function then finds the other ranks through Gloo.
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
"""Maximum time that a rank waits for the others at the rendezvous."""


@dataclass
class HorovodConfig(BackendConfig):
    """A `backend_config` for `DataParallelTrainer`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return HorovodBackend


class HorovodBackend(Backend):
    """Runs in the Train controller: starts a rendezvous server for each group of workers."""

    _server: Any = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        self._stop_server()  # of a group that died without a shutdown
        with releasing_resources(worker_group):
            slots = assign_slots(worker_group.execute(_node_id))
            address = ray.util.get_node_ip_address()
            self._server = start_rendezvous(address, slots)
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
                        rank, _set_environment, {**slot.environment(), **rendezvous}
                    )
                    for rank, slot in enumerate(slots)
                ]
            )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        self._stop_server()

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextmanager
def releasing_resources(worker_group: Any) -> Iterator[None]:
    """Release the group's resources if the block fails; Ray would keep them reserved."""
    try:
        yield
    except BaseException:
        worker_group.get_worker_group_state().shutdown()
        raise


@dataclass(frozen=True)
class Slot:
    """A rank's place among all ranks, among those on its node (`local_`), and among those of all nodes with
    the same local rank (`cross_`)."""

    hostname: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int

    def environment(self) -> dict[str, str]:
        """Environment variables that `hvd.init()` reads."""
        return {f"HOROVOD_{name.upper()}": str(value) for name, value in vars(self).items()}


def assign_slots(nodes: list[str]) -> list[Slot]:
    """The slot of each rank, from the ids of the nodes that the ranks run on."""
    local_sizes = Counter(nodes)
    node_order = list(local_sizes)  # nodes by their first rank
    num_assigned: Counter[str] = Counter()
    slots = []
    for rank, node in enumerate(nodes):
        local_rank = num_assigned[node]
        num_assigned[node] += 1
        peers = [n for n in node_order if local_sizes[n] > local_rank]
        slots.append(
            Slot(node, rank, len(nodes), local_rank, local_sizes[node], peers.index(node), len(peers))
        )
    return slots


def start_rendezvous(address: str, slots: list[Slot]) -> Any:
    """Start Horovod's rendezvous server, on one address only; it serves in a thread.

    The server accepts writes without authentication, so it must not be reachable from outside of the
    cluster, and it ends with the group of workers. Only Gloo uses it, to store raw bytes; nothing unpickles
    them.
    """
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(slots)
    threading.Thread(target=server.serve_forever, name="horovod-rendezvous", daemon=True).start()
    return server


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _set_environment(variables: dict[str, str]) -> None:
    """Set a worker's slot and the address of the rendezvous in its environment."""
    os.environ.update(variables)
    use_cluster_interface()


def use_cluster_interface() -> None:
    """Have Gloo listen only on the network interface that has this node's address."""
    node_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == node_address for a in addresses):
            os.environ["HOROVOD_GLOO_IFACE"] = os.environ["GLOO_SOCKET_IFNAME"] = name
