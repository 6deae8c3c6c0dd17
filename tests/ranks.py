"""Two real ranks for a test, without Ray: processes joined over Horovod or torch.distributed."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 60


class Pair:
    """Runs a function on both ranks and returns both results. The function must be importable."""

    def __init__(self, pipes: list[Any]):
        self._pipes = pipes

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self._pipes:
            assert pipe.poll(TIMEOUT_S), "a rank hangs"
            answers.append(pipe.recv())
        failures = [answer for failed, answer in answers if failed]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]


@contextmanager
def pair(backend: str, folder: Path) -> Iterator[Pair]:
    """Two ranks over `horovod` or `ddp`. `folder` holds the file through which `ddp` connects them."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, server = [], [], None
    if backend == "horovod":
        from app.training.workers.horovod import assign_slots, start_rendezvous

        slots = assign_slots(["node", "node"])
        server = start_rendezvous("127.0.0.1", slots)
        rendezvous = {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": "lo",
        }
        environments = [{**slot.environment(), **rendezvous} for slot in slots]
    else:
        environments = [{"GLOO_SOCKET_IFNAME": "lo"}] * 2
    try:
        for rank, environment in enumerate(environments):
            parent_end, child_end = spawn.Pipe()
            process = spawn.Process(
                target=_serve_one, args=(child_end, backend, rank, str(folder / "store"), environment)
            )
            process.start()
            child_end.close()
            pipes.append(parent_end)
            processes.append(process)
        yield Pair(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
        if server:
            server.shutdown()
            server.server_close()


def _serve_one(pipe: Any, backend: str, rank: int, store: str, environment: dict[str, str]) -> None:
    """Join the group, then run the functions received through the pipe until this rank is killed."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if backend == "ddp":
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((False, function(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
