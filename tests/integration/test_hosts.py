"""Training and serving on two hosts: network namespaces with their own addresses and host names, connected by
virtual cables."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest

from app.cluster.ports import free_ports
from tests.nodes import ROOT, Host, nodes

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and `ip`, for namespaces"
    ),
]

CLUSTER, OTHER = "cluster0", "other0"
SMALL = ("data.source.limit=3000", "training.batch_size=16", "training.epochs=3")


@dataclass(frozen=True)
class Machine(Host):
    name: str = ""
    other_address: str = ""
    """Address in a network that the cluster must not use."""

    def run(self, *command: str) -> str:
        process = subprocess.run([*self.enter, *command], check=True, capture_output=True, text=True)
        return process.stdout

    def sent_bytes(self, interface: str) -> int:
        """Number of bytes sent over a network interface so far."""
        (link,) = json.loads(self.run("ip", "-json", "-stats", "link", "show", interface))
        return link["stats64"]["tx"]["bytes"]

    def reaches(self, address: str, port: str) -> bool:
        connect = f"import socket; print(socket.socket().connect_ex(({address!r}, {port})))"
        return self.run("python3", "-c", connect).strip() == "0"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two machines in two networks; the default route uses the network that the cluster does not use."""
    table = tmp_path_factory.mktemp("hosts") / "hosts"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    names = [f"raylway-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"cannot create network namespaces: {error.stderr.decode().strip()}")
            ip("-n", name, "link", "set", "lo", "up")
        for network, link in enumerate((CLUSTER, OTHER), start=1):
            ip("link", "add", link, "netns", names[0], "type", "veth", "peer", link, "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.99.{network}.{number}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
        machines = []
        for number, name in enumerate(names, start=1):
            ip("-n", name, "route", "add", "default", "via", f"10.99.2.{3 - number}")
            enter_host = f'hostname {name} && mount --bind {table} /etc/hosts && exec "$@"'
            enter = ("nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount")
            enter = (*enter, "sh", "-c", enter_host, "sh")
            machines.append(Machine(f"10.99.1.{number}", enter, name, f"10.99.2.{number}"))
        names_of = "".join(f"{machine.address} {machine.name}\n" for machine in machines)
        table.write_text(f"127.0.0.1 localhost\n{names_of}")
        yield machines
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture(scope="module")
def cluster(home, hosts):
    """A cluster with two CPUs on each host."""
    with nodes(hosts[0]) as cluster:
        for host in hosts:
            cluster.join(2, host)
        yield cluster


@pytest.mark.parametrize("backend", ["horovod", "ddp"])
def test_four_ranks_train_on_two_hosts_over_the_cluster_network_only(cluster, hosts, tmp_path, backend):
    wide = (f"training.backend={backend}", "training.num_workers=4", "model.hidden=[256, 256]")
    first, second = hosts
    before = [(host.sent_bytes(CLUSTER), host.sent_bytes(OTHER)) for host in hosts]
    training = cluster.train(tmp_path / "run", *SMALL, *wide, seconds_per_step=0.1)
    training.wait_for_ranks(4, timeout=180)
    training.wait_for("epoch", timeout=120)
    ranks = sorted(training.ranks(), key=lambda rank: rank["rank"])
    rendezvous = ranks[0]["environment"]
    if backend == "horovod":
        port = rendezvous["HOROVOD_GLOO_RENDEZVOUS_PORT"]
        assert rendezvous["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == first.address
        assert second.reaches(first.address, port)
        assert not second.reaches(first.other_address, port)
        assert not first.reaches("127.0.0.1", port)
    training.wait_for("end", timeout=120)
    ranks = sorted(training.ranks(), key=lambda rank: rank["rank"])
    assert sorted(rank["hostname"] for rank in ranks) == [first.name] * 2 + [second.name] * 2
    assert [rank["hostname"] for rank in ranks[::2]] == [rank["hostname"] for rank in ranks[1::2]]
    names = ("HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME")
    assert {rank["environment"][name] for rank in ranks for name in names} == {CLUSTER}
    address = {host.name: host.address for host in hosts}
    for rank in ranks:
        rank["listens"].remove("::")  # Ray's own port
        assert set(rank["listens"]) <= {address[rank["hostname"]]}
    assert len({rank["parameters"] for rank in ranks}) == 1
    # In a ring, every cable carries all gradients one and a half times.
    min_bytes = ranks[0]["steps"] * ranks[0]["bytes"]
    for host, (cluster_bytes, other_bytes) in zip(hosts, before, strict=True):
        assert host.sent_bytes(CLUSTER) - cluster_bytes > min_bytes
        assert host.sent_bytes(OTHER) - other_bytes < min_bytes / 100


def test_an_endpoint_answers_on_two_hosts(home, hosts, server, monkeypatch):
    """Each host has one replica. Both hosts answer requests with a token; replicas answer HAProxy only."""
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", server.url())
    with nodes(hosts[0]) as cluster:
        for host in hosts:
            cluster.join(1, host)
        port = free_ports(1)[0]

        def raylway(*arguments: str, code: int = 0, database: bool = True) -> str:
            environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
            if not database:
                environment.pop("RAYLWAY_DATABASE_URL")
            command = [*hosts[0].enter, sys.executable, "-m", "app", *arguments]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == code, done.stdout + done.stderr
            return done.stdout + done.stderr

        settings = [
            "training.num_workers=1", "training.num_cpus=0.5", "training.epochs=1", f"serving.port={port}",
            "serving.num_cpus=0.5", "serving.autoscaling={min_replicas: 2, max_replicas: 2}",
        ]  # fmt: skip
        smoke = ["configs/smoke.yaml", *(part for setting in settings for part in ("--set", setting))]
        assert "SQLite is for one node" in raylway("train", *smoke, code=2, database=False)
        raylway("train", *smoke)
        assert "this cluster has several nodes" in raylway("serve", *smoke, code=2)
        guarded = [*smoke, "--set", "serving.auth=local"]
        assert "must be 0.0.0.0" in raylway("serve", *guarded, "--set", "serving.host=10.99.1.1", code=2)
        raylway("serve", *guarded, "--set", "serving.host=0.0.0.0")
        token = raylway("token", "somebody").split()[-1]

        addresses = [host.address for host in hosts]
        first, last = (
            cluster.environment[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"] for end in ("MIN", "MAX")
        )
        probe = f"""
import httpx, socket
for address in {addresses}:
    for headers in ({{"authorization": "Bearer {token}"}}, {{}}):
        url = f"http://{{address}}:{port}/v2/models/smoke"
        print(address, httpx.get(url, headers=headers, trust_env=False, timeout=20).status_code)
    for replica in range({first}, {last} + 1):
        if socket.socket().connect_ex((address, replica)) == 0:
            print(address, httpx.get(f"http://{{address}}:{{replica}}/v2", trust_env=False).status_code)
"""
        for host in hosts:
            lines = host.run(sys.executable, "-c", probe).splitlines()
            for address in addresses:
                with_token, without, *replicas = [
                    line.split()[1] for line in lines if line.startswith(address)
                ]
                assert (with_token, without) == ("200", "401")
                assert replicas, "each host has a replica"
                assert set(replicas) == {"403"}


def test_a_training_survives_an_unplugged_cable(home, hosts, tmp_path):
    """After a short interruption the group continues; after a long one it restarts on the other host."""
    first, second = hosts
    with nodes(first) as cluster:
        for host in hosts:
            cluster.join(1, host)
        long = ("training.epochs=40", "training.max_failures=1")
        training = cluster.train(tmp_path / "run", *SMALL, *long, seconds_per_step=0.05)
        ranks = training.wait_for_ranks(2, timeout=180)
        assert {rank["hostname"] for rank in ranks} == {first.name, second.name}
        training.wait_for("epoch", timeout=60)
        second.run("ip", "link", "set", CLUSTER, "down")
        time.sleep(10)
        second.run("ip", "link", "set", CLUSTER, "up")
        for _ in range(3):
            training.wait_for("epoch", timeout=60)
        assert training.ranks(2) == ranks
        second.run("ip", "link", "set", CLUSTER, "down")
        remaining = next(rank for rank in ranks if rank["hostname"] == first.name)
        psutil.Process(remaining["pid"]).wait(timeout=60)
        cluster.join(1, first)
        training.wait_for("note", "resuming from epoch", timeout=120)
        assert {rank["hostname"] for rank in training.ranks(2)[2:]} == {first.name}
        history = training.wait_for("end", timeout=180)["history"]
    second.run("ip", "link", "set", CLUSTER, "up")
    assert [e["epoch"] for e in history] == list(range(40))
