"""A Ray cluster of several nodes on this machine, and trainings on it in processes of their own."""

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
START_S = 90


@dataclass(frozen=True)
class Host:
    """Where nodes run: this machine, or a network namespace of it that stands for another machine."""

    address: str
    enter: tuple[str, ...] = ()
    """A command that runs another there."""


@dataclass(frozen=True)
class Node:
    id: str
    process: subprocess.Popen
    """`ray start --block`, which holds the node's other processes."""

    def kill(self) -> None:
        """As if its machine lost power."""
        held = psutil.Process(self.process.pid)
        processes = [*held.children(recursive=True), held]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


HERE = Host(ray.util.get_node_ip_address())


class Nodes:
    """A head on the first host, without CPUs so that no rank comes to it; other nodes as they `join`."""

    def __init__(self, host: Host = HERE):
        self.host = host
        self._owned = guardian.create_directory()
        self._directory = self._owned.path
        self._started: list[subprocess.Popen] = []
        ensure_token()
        self.environment = local_environment(self._directory) | {"OMP_NUM_THREADS": "1"}
        """Of its nodes, and of the commands that join it."""
        del self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # so set, it forbids a second node
        (port, client_port) = free_ports(2)
        self.address = f"{host.address}:{port}"
        options = (f"--port={port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false")
        self.head = self._start(host, "--head", *options, f"--temp-dir={self._directory}/ray")

    def join(self, num_cpus: int, host: Host | None = None) -> Node:
        """Start another node and wait until it is there."""
        return self._start(host or self.host, f"--address={self.address}", num_cpus=num_cpus)

    def drain(self, node: str, seconds: int) -> None:
        """What a cloud's preemption notice comes to: the node will be gone in so many seconds."""
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot")
        deadline = f"--deadline-remaining-seconds={seconds}"
        self._ray("drain-node", f"--address={self.address}", f"--node-id={node}", *reason, deadline)

    def train(self, folder: Path, *overrides: str, seconds_per_step: float = 0.0) -> "Training":
        """Begin to train configs/smoke.yaml; `overrides` are `KEY=VALUE`."""
        command = [sys.executable, "-m", "tests.driver", folder / "ranks", seconds_per_step, *overrides]
        env = {**self.environment, "RAY_ADDRESS": self.address}
        training = Training([*self.host.enter, *map(str, command)], env, folder)
        self._started.append(training.process)
        return training

    def stop(self) -> None:
        """All nodes of this cluster, and no other."""
        self._owned.destroy()
        for process in self._started:
            process.wait()

    def _start(self, host: Host, *options: str, num_cpus: int = 0) -> Node:
        ports = ("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0")
        command = ["start", "--block", f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}", *ports]
        log = self._directory / f"node-{len(self._started)}.log"
        with log.open("w") as said:
            process = subprocess.Popen(
                [*host.enter, RAY, *command, *options],
                env=self.environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            if time.monotonic() > deadline or process.poll() is not None:
                said = log.read_text()
                self.stop()
                raise TimeoutError(f"no new node within {START_S} s: {said[-2000:]}")
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = (child for child in children if child.name() == "raylet")
        (option,) = (each for each in raylet.cmdline() if each.startswith("--node_id="))
        return Node(option.removeprefix("--node_id="), process)

    def _ray(self, *command: str) -> None:
        full = [*self.host.enter, RAY, *command]
        subprocess.run(full, env=self.environment, check=True, capture_output=True, timeout=60)


class Training:
    """A training under way, by tests/driver.py; what it says is kept."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "ranks").mkdir()
        self._said: list[dict[str, Any]] = []
        self._change = threading.Condition()
        with (folder / "driver.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def ranks(self, size: int | None = None) -> list[dict[str, Any]]:
        """The ranks of all groups so far, in the order of their start; or of those with so many ranks."""
        notes = [json.loads(f.read_text()) for f in sorted((self._folder / "ranks").glob("*.json"))]
        return [note for note in notes if size in (None, note["size"])]

    def wait_for(self, kind: str, text: str = "", timeout: float = 60) -> dict[str, Any]:
        """The next thing of a kind that is said, with this text in it; what came before is skipped."""

        def found() -> bool:
            while self._said and not (self._said[0]["kind"] == kind and text in str(self._said[0])):
                if self._said[0]["kind"] == "error":
                    raise AssertionError(self._said[0])
                self._said.pop(0)
            return bool(self._said)

        return self._await(found, timeout, f"{kind} {text}") and self._said.pop(0)

    def wait_for_ranks(self, size: int, timeout: float = 60) -> list[dict[str, Any]]:
        """Until all ranks of a group of this size have begun."""
        self._await(lambda: len(self.ranks(size)) >= size, timeout, f"{size} ranks")
        return self.ranks(size)[-size:]

    def _await(self, found: Callable[[], bool], timeout: float, what: str) -> bool:
        deadline = time.monotonic() + timeout
        with self._change:
            while not found():
                if time.monotonic() > deadline or self.process.poll():
                    raise TimeoutError(f"not within {timeout:g} s: {what}; {self._log()}")
                self._change.wait(0.2)
        return True

    def _log(self) -> str:
        return (self._folder / "driver.log").read_text()[-2000:]

    def _listen(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                if not line.startswith("{"):  # Ray's
                    continue
                with self._change:
                    self._said.append(json.loads(line))
                    self._change.notify_all()


@contextlib.contextmanager
def nodes(host: Host = HERE) -> Iterator[Nodes]:
    """A cluster for the time of the block, with the state directory of this process."""
    started = Nodes(host)
    try:
        yield started
    finally:
        started.stop()
