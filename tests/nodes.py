"""A Ray cluster of several nodes on this machine, and trainings on it, each in its own process."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from app.cluster import guardian
from app.cluster.ports import free_ports
from app.cluster.session import ensure_token, local_environment

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 90


@dataclass(frozen=True)
class Host:
    """Where nodes run: this machine, or one of its network namespaces, which acts as another machine."""

    address: str
    enter: tuple[str, ...] = ()
    """Command prefix that runs a command on the host."""


@dataclass(frozen=True)
class Node:
    id: str
    process: subprocess.Popen
    """`ray start --block`, the parent of the node's other processes."""

    def kill(self) -> None:
        """Kill all processes of the node, as if its machine lost power."""
        parent = psutil.Process(self.process.pid)
        processes = [*parent.children(recursive=True), parent]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


THIS_HOST = Host(ray.util.get_node_ip_address())


class Nodes:
    """A cluster: a head without CPUs, which therefore gets no rank, and the nodes that `join` it."""

    def __init__(self, host: Host = THIS_HOST):
        self.host = host
        self._owned = guardian.create_directory()
        self._directory = self._owned.path
        self._started: list[subprocess.Popen] = []
        ensure_token()
        self.environment = local_environment(self._directory) | {"OMP_NUM_THREADS": "1"}
        """Environment of the nodes, and of the commands that join the cluster."""
        del self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # "0" forbids a second node
        port, client_port = free_ports(2)
        self.address = f"{host.address}:{port}"
        options = (f"--port={port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false")
        self.head = self._start(host, "--head", *options, f"--temp-dir={self._directory}/ray")

    def join(self, num_cpus: int, host: Host | None = None) -> Node:
        """Start another node and wait until it has joined."""
        return self._start(host or self.host, f"--address={self.address}", num_cpus=num_cpus)

    def drain(self, node: str, seconds: int) -> None:
        """Announce, as a cloud does before a preemption, that the node will be taken away in `seconds`."""
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot")
        deadline = f"--deadline-remaining-seconds={seconds}"
        self._ray("drain-node", f"--address={self.address}", f"--node-id={node}", *reason, deadline)

    def train(self, folder: Path, *overrides: str, seconds_per_step: float = 0.0) -> "Training":
        """Start a training of configs/smoke.yaml; `overrides` are `KEY=VALUE`."""
        command = [sys.executable, "-m", "tests.driver", folder / "ranks", seconds_per_step, *overrides]
        env = {**self.environment, "RAY_ADDRESS": self.address}
        training = Training([*self.host.enter, *map(str, command)], env, folder)
        self._started.append(training.process)
        return training

    def stop(self) -> None:
        """Stop all nodes of this cluster, and no other cluster."""
        self._owned.destroy()
        for process in self._started:
            process.wait()

    def _start(self, host: Host, *options: str, num_cpus: int = 0) -> Node:
        ports = ("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0")
        command = ["start", "--block", f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}", *ports]
        log = self._directory / f"node-{len(self._started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*host.enter, RAY, *command, *options],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            if time.monotonic() > deadline or process.poll() is not None:
                text = log.read_text()
                self.stop()
                raise TimeoutError(f"no new node within {START_TIMEOUT_S} s: {text[-2000:]}")
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = (child for child in children if child.name() == "raylet")
        (option,) = (argument for argument in raylet.cmdline() if argument.startswith("--node_id="))
        return Node(option.removeprefix("--node_id="), process)

    def _ray(self, *command: str) -> None:
        full = [*self.host.enter, RAY, *command]
        subprocess.run(full, env=self.environment, check=True, capture_output=True, timeout=60)


class Training:
    """A training by tests/driver.py in another process, and the events that it prints."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "ranks").mkdir()
        self._events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        with (folder / "driver.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def ranks(self, size: int | None = None) -> list[dict[str, Any]]:
        """Notes of the ranks so far, in the order of their start; with `size`, of groups of that size."""
        notes = [json.loads(f.read_text()) for f in sorted((self._folder / "ranks").glob("*.json"))]
        return [note for note in notes if size in (None, note["size"])]

    def wait_for(self, kind: str, text: str = "", timeout: float = 60) -> dict[str, Any]:
        """The next event of a kind that contains the text; earlier events are skipped."""

        def has_event() -> bool:
            while self._events and not (self._events[0]["kind"] == kind and text in str(self._events[0])):
                if self._events[0]["kind"] == "error":
                    raise AssertionError(self._events[0])
                self._events.pop(0)
            return bool(self._events)

        return self._await(has_event, timeout, f"{kind} {text}") and self._events.pop(0)

    def wait_for_ranks(self, size: int, timeout: float = 60) -> list[dict[str, Any]]:
        """Notes of the ranks of a group of this size, once all of them have started."""
        self._await(lambda: len(self.ranks(size)) >= size, timeout, f"{size} ranks")
        return self.ranks(size)[-size:]

    def _await(self, condition: Callable[[], bool], timeout: float, name: str) -> bool:
        deadline = time.monotonic() + timeout
        with self._changed:
            while not condition():
                if time.monotonic() > deadline or self.process.poll():
                    raise TimeoutError(f"not within {timeout:g} s: {name}; {self._log()}")
                self._changed.wait(0.2)
        return True

    def _log(self) -> str:
        return (self._folder / "driver.log").read_text()[-2000:]

    def _listen(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                if not line.startswith("{"):  # Ray's output
                    continue
                with self._changed:
                    self._events.append(json.loads(line))
                    self._changed.notify_all()


@contextlib.contextmanager
def nodes(host: Host = THIS_HOST) -> Iterator[Nodes]:
    """A cluster that runs until the block ends, with the state directory of this process."""
    cluster = Nodes(host)
    try:
        yield cluster
    finally:
        cluster.stop()
