"""What the ranks do together, the same over Horovod and over torch.distributed."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from app.config import Training
from app.training import gradients
from app.training.gradients import Gradients


class Collective(Protocol):
    """This process among the ranks. Every method but the properties is called by all ranks, in one order."""

    rank: int
    size: int

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with rank 0's."""

    def average(self, tensor: Tensor) -> None:
        """Overwrite a tensor with its mean over the ranks."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks; each may have another number of them."""

    def gradients(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
        """How the gradients of this network are exchanged."""

    def close(self) -> None:
        """Leave the group."""


def join(training: Training, timeline: Path) -> Collective:
    """Become a rank. Ray Train's backend has told this process where the others are."""
    if training.max_workers == 1 and not training.timeline:
        return Alone()
    return Horovod(training, timeline) if training.backend == "horovod" else TorchDistributed(training)


class Alone:
    """One rank, with nobody to talk to."""

    rank, size = 0, 1

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        pass

    def average(self, tensor: Tensor) -> None:
        pass

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gradients(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
        return gradients.Flat(network, optimizer, exchange=lambda buffer: None)

    def close(self) -> None:
        pass


class Horovod:
    """Ranks of Horovod (Sergeev and Del Balso, 2018)."""

    def __init__(self, training: Training, timeline: Path):
        """`timeline` is the file that rank 0 writes if the project asks for one."""
        os.environ["HOROVOD_AUTOTUNE"] = str(int(training.horovod.autotune))
        # Gradients come in buckets; to gather those again would be one more copy of each.
        fixed = {"FUSION_THRESHOLD": "0", "CYCLE_TIME": str(training.horovod.cycle_time_ms)}
        for name, value in fixed.items():
            os.environ[f"HOROVOD_{name}"] = value
            if training.horovod.autotune:  # what is set, Horovod does not tune
                del os.environ[f"HOROVOD_{name}"]
        if training.timeline:
            timeline.parent.mkdir(parents=True, exist_ok=True)
            os.environ["HOROVOD_TIMELINE"] = str(timeline)
        import horovod.torch as hvd

        hvd.init()
        self._hvd: Any = hvd
        self._training = training
        self.rank, self.size = hvd.rank(), hvd.size()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        handles = [self._hvd.broadcast_async_(t, 0, name=f"broadcast.{i}") for i, t in enumerate(tensors)]
        for handle in handles:
            self._hvd.synchronize(handle)

    def average(self, tensor: Tensor) -> None:
        self._hvd.allreduce_(tensor, name="average", op=self._hvd.Average)

    def gather(self, tensor: Tensor) -> Tensor:
        # As bytes: neither library knows all types of numbers.
        rows = tensor.contiguous().view(torch.uint8)
        return self._hvd.allgather(rows, name=f"gather.{tensor.dim()}").view(tensor.dtype)

    def gradients(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
        begin = self._begin_bf16 if self._training.compression == "bf16" else self._begin
        if gradients.overlaps(self._training, network):
            bucket_bytes = int(self._training.horovod.fusion_threshold_mb * 2**20)
            return gradients.Overlapped(network, optimizer, bucket_bytes, begin)
        return gradients.Flat(network, optimizer, lambda buffer: begin(buffer, "gradients")())

    def _begin(self, buffer: Tensor, name: str) -> Callable[[], None]:
        """Begin to overwrite a buffer with its combination over the ranks, and return what waits for it."""
        hvd = self._hvd
        fp16 = self._training.compression == "fp16"
        small = buffer.half() if fp16 else buffer
        operation = hvd.Adasum if self._training.horovod.adasum else hvd.Average
        handle = hvd.allreduce_async_(small, name=name, op=operation)

        def finish() -> None:
            hvd.synchronize(handle)
            if fp16:
                buffer.copy_(small)

        return finish

    def _begin_bf16(self, buffer: Tensor, name: str) -> Callable[[], None]:
        """The same. Horovod adds no bfloat16 numbers: each rank adds those of all."""
        rows = buffer.to(torch.bfloat16)[None].view(torch.uint8)
        handle = self._hvd.allgather_async(rows, name=name)

        def finish() -> None:
            gathered = self._hvd.synchronize(handle).view(torch.bfloat16)
            torch.mean(gathered, dim=0, dtype=torch.float32, out=buffer)

        return finish

    def close(self) -> None:
        self._hvd.shutdown()


class TorchDistributed:
    """Ranks of torch.distributed: NCCL on GPUs, else Gloo."""

    def __init__(self, training: Training):
        from torch import distributed

        self._distributed: Any = distributed
        self._training = training
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            there = self._on_device(tensor)
            self._distributed.broadcast(there, 0)
            if there is not tensor:
                tensor.copy_(there)

    def average(self, tensor: Tensor) -> None:
        self._distributed.all_reduce(tensor)
        tensor /= self.size

    def gather(self, tensor: Tensor) -> Tensor:
        rows = self._on_device(tensor.contiguous().view(torch.uint8))
        counts = [self._on_device(torch.zeros(1, dtype=torch.int64)) for _ in range(self.size)]
        self._distributed.all_gather(counts, self._on_device(torch.tensor([len(rows)])))
        most = int(torch.cat(counts).max())
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._distributed.all_gather(parts, padded)
        joined = torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
        return joined.view(tensor.dtype)

    def gradients(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
        compression = self._training.compression
        if gradients.overlaps(self._training, network):
            return gradients.OverlappedByDdp(network, optimizer, compression)
        dtype = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]

        def exchange(buffer: Tensor) -> None:
            small = buffer.to(dtype) if dtype else buffer
            self.average(small)
            if dtype:
                buffer.copy_(small)

        return gradients.Flat(network, optimizer, exchange)

    def close(self) -> None:
        self._distributed.destroy_process_group()

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if self._distributed.get_backend() == "nccl" else tensor
