import socket
from dataclasses import asdict

import pytest
import ray
from horovod.runner.common.util.hosts import HostInfo, get_host_assignments

from app.training.workers.ddp import DdpConfig
from app.training.workers.horovod import HorovodBackend, HorovodConfig, Slot, assign_slots, start_rendezvous


@pytest.mark.parametrize(
    "layout", [[1], [2], [1, 1], [2, 2], [3, 1], [1, 3], [1, 2, 3], [3, 1, 2], [4, 1, 2]]
)
def test_slots_are_those_that_horovod_assigns(layout):
    names = [f"node-{i}" for i in range(len(layout))]
    theirs = get_host_assignments([HostInfo(n, c) for n, c in zip(names, layout, strict=True)], sum(layout))
    ours = assign_slots([name for name, count in zip(names, layout, strict=True) for _ in range(count)])
    assert [asdict(slot) for slot in ours] == [asdict(slot) for slot in theirs]


@pytest.mark.parametrize("nodes", ["abab", "abba", "aababcb", "bca"])
def test_ranks_that_are_not_grouped_by_node_have_consistent_slots(nodes):
    places = assign_slots(list(nodes))
    assert [(p.hostname, p.rank, p.size) for p in places] == [(n, i, len(nodes)) for i, n in enumerate(nodes)]
    assert len({(p.hostname, p.local_rank) for p in places}) == len(nodes)
    for place in places:
        local = [p for p in places if p.hostname == place.hostname]
        assert sorted(p.local_rank for p in local) == list(range(place.local_size))
        cross = [p for p in places if p.local_rank == place.local_rank]
        assert sorted(p.cross_rank for p in cross) == list(range(place.cross_size))


def test_the_environment_has_the_variables_of_horovod():
    assert Slot(
        "n", rank=3, size=5, local_rank=1, local_size=2, cross_rank=0, cross_size=4
    ).environment() == {
        "HOROVOD_HOSTNAME": "n",
        "HOROVOD_RANK": "3",
        "HOROVOD_SIZE": "5",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "4",
    }


@pytest.fixture
def server():
    server = start_rendezvous("127.0.0.1", assign_slots(["a", "a", "b"]))
    yield server
    server.shutdown()
    server.server_close()


def test_the_rendezvous_listens_on_one_address_only(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.server_port), timeout=5)


def test_the_backend_closes_its_port():
    backend = HorovodConfig().backend_cls()
    assert isinstance(backend, HorovodBackend)
    backend._server = start_rendezvous("127.0.0.1", assign_slots(["a"]))
    port = backend._server.server_port
    for _ in range(2):  # Ray shuts a group that died down twice
        backend.on_shutdown(None, HorovodConfig())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize("config", [HorovodConfig, DdpConfig])
def test_a_group_that_fails_to_start_releases_its_resources(config):
    class Group:
        """A group whose ranks are dead."""

        num_shutdowns = 0

        def execute(self, function, *_):
            raise ray.exceptions.ActorDiedError

        execute_single = execute

        def get_worker_group_state(self):
            return self

        def shutdown(self):
            self.num_shutdowns += 1

    group = Group()
    with pytest.raises(ray.exceptions.ActorDiedError):
        config().backend_cls().on_start(group, config())
    assert group.num_shutdowns == 1
