"""The peer of bench_train.py: a plain training loop over the same network, rows and batches.

Started by bench_train.py under `torchrun` (`ddp`: DistributedDataParallel) or `horovodrun` (`horovod`:
DistributedOptimizer; `flat`: one allreduce of all gradients, which suits small networks better).
Rank 0 writes JSON: the mean seconds per step of each epoch, and the time at which the first step ended.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from app.config import Project
from app.data.prepare import Prepared
from app.tasks import task_of
from app.training import shards


class Loss(nn.Module):
    """The loss as a forward pass: DistributedDataParallel averages gradients only after its own `forward`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.network.loss(*batch)


def main(backend: str, settings: dict, output: Path) -> None:
    project = Project.model_validate(settings["project"])
    training = project.training
    torch.set_num_threads(1)
    if backend == "ddp":
        torch.distributed.init_process_group("gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        import horovod.torch as hvd

        hvd.init()
        rank, size = hvd.rank(), hvd.size()
    task = task_of(project, Prepared(Path(settings["prepared"]), cached=True))
    frame = shards.read(task.prepared.part("train"), rank, size)
    rows = {name: torch.as_tensor(array) for name, array in task.arrays(frame).items()}
    num_steps = len(frame) // training.batch_size
    torch.manual_seed(project.seed)
    network = task.network()
    optimizer = torch.optim.AdamW(task.parameter_groups(network), lr=training.learning_rate, fused=True)
    loss_of, average = network.loss, None
    if backend == "ddp":
        loss_of = torch.nn.parallel.DistributedDataParallel(Loss(network), gradient_as_bucket_view=True)
    elif backend == "horovod":
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named)
        hvd.broadcast_parameters(network.state_dict(), root_rank=0)
    else:
        sizes = [p.numel() for p in network.parameters()]
        buffer = torch.zeros(sum(sizes))
        for parameter, part in zip(network.parameters(), buffer.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        hvd.broadcast_parameters(network.state_dict(), root_rank=0)

        def average() -> None:
            hvd.allreduce_(buffer, name="gradients", op=hvd.Average)

    # Horovod's optimizer takes no set_to_none, and the flat buffer must stay where it is.
    clear = optimizer.zero_grad if backend != "flat" else partial(optimizer.zero_grad, set_to_none=False)
    seconds, first_step = [], None
    for epoch in range(training.epochs):
        torch.manual_seed(epoch)
        order = task.arrange(rows, torch.randperm(len(frame)), training.batch_size)
        network.train()
        started = time.perf_counter()
        for step in range(num_steps):
            chosen = order[step * training.batch_size : (step + 1) * training.batch_size]
            clear()
            loss = loss_of(*task.batch(rows, chosen))
            loss.backward()
            if average:
                average()
            optimizer.step()
            first_step = first_step or time.time()
        seconds.append((time.perf_counter() - started) / num_steps)
    if rank == 0:
        output.write_text(json.dumps({"step_s": seconds, "first_step": first_step}))
    # Gloo's threads still run: a normal interpreter exit sometimes aborts.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
