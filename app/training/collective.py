"""Collective operations of the ranks, the same over Horovod and over torch.distributed."""

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
    """This process as one of the ranks.

    All ranks must call the same methods in the same order.
    """

    rank: int
    size: int

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""

    def average(self, tensor: Tensor) -> None:
        """Overwrite a tensor with its mean over the ranks."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, joined along the first axis in the order of the ranks.

        The length of that axis may differ between ranks.
        """

    def gradients(self, network: nn.Module) -> Gradients:
        """Prepare the network's parameters for the exchange of their gradients."""

    def close(self) -> None:
        """Leave the group."""


def join(training: Training, timeline: Path) -> Collective:
    """Join the group of ranks, whose addresses Ray Train's backend must have set in this process.

    With `training.timeline`, Horovod's rank 0 writes the file `timeline`.
    """
    if training.max_workers == 1 and not training.timeline:
        return Alone()
    return Horovod(training, timeline) if training.backend == "horovod" else TorchDistributed(training)


class Alone:
    """The only rank."""

    rank, size = 0, 1

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        pass

    def average(self, tensor: Tensor) -> None:
        pass

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gradients(self, network: nn.Module) -> Gradients:
        return gradients.Flat(network, exchange=lambda buffer: None)

    def close(self) -> None:
        pass


class Horovod:
    """Ranks of Horovod (Sergeev and Del Balso, 2018)."""

    def __init__(self, training: Training, timeline: Path):
        os.environ["HOROVOD_AUTOTUNE"] = str(int(training.horovod.autotune))
        # A fusion threshold of 0, because our gradients are in buckets already: fusing would copy them again.
        fixed = {"FUSION_THRESHOLD": "0", "CYCLE_TIME": str(training.horovod.cycle_time_ms)}
        for name, value in fixed.items():
            os.environ[f"HOROVOD_{name}"] = value
            if training.horovod.autotune:  # Horovod does not tune what the environment sets
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
        # As bytes, because neither library supports all dtypes.
        rows = tensor.contiguous().view(torch.uint8)
        return self._hvd.allgather(rows, name=f"gather.{tensor.dim()}").view(tensor.dtype)

    def gradients(self, network: nn.Module) -> Gradients:
        bf16 = self._training.compression == "bf16"
        begin_exchange = self._begin_bf16_exchange if bf16 else self._begin_exchange
        if gradients.overlaps(self._training, network):
            bucket_bytes = int(self._training.horovod.fusion_threshold_mb * 2**20)
            return gradients.Overlapped(network, bucket_bytes, begin_exchange)
        return gradients.Flat(network, lambda buffer: begin_exchange(buffer, "gradients")())

    def _begin_exchange(self, buffer: Tensor, name: str) -> Callable[[], None]:
        """Start to overwrite a buffer with its mean, or Adasum, over the ranks.

        Returns a function that waits until the buffer is overwritten.
        """
        hvd = self._hvd
        fp16 = self._training.compression == "fp16"
        exchanged = buffer.half() if fp16 else buffer
        operation = hvd.Adasum if self._training.horovod.adasum else hvd.Average
        handle = hvd.allreduce_async_(exchanged, name=name, op=operation)

        def wait() -> None:
            hvd.synchronize(handle)
            if fp16:
                buffer.copy_(exchanged)

        return wait

    def _begin_bf16_exchange(self, buffer: Tensor, name: str) -> Callable[[], None]:
        """Like `_begin_exchange`, in bfloat16. Horovod cannot add these numbers, so each rank gathers the
        buffers of all ranks and averages them."""
        rows = buffer.to(torch.bfloat16)[None].view(torch.uint8)
        handle = self._hvd.allgather_async(rows, name=name)

        def wait() -> None:
            gathered = self._hvd.synchronize(handle).view(torch.bfloat16)
            torch.mean(gathered, dim=0, dtype=torch.float32, out=buffer)

        return wait

    def close(self) -> None:
        self._hvd.shutdown()


class TorchDistributed:
    """Ranks of torch.distributed, over NCCL on GPUs and over Gloo otherwise."""

    def __init__(self, training: Training):
        from torch import distributed

        self._distributed: Any = distributed
        self._training = training
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            on_device = self._on_device(tensor)
            self._distributed.broadcast(on_device, 0)
            if on_device is not tensor:
                tensor.copy_(on_device)

    def average(self, tensor: Tensor) -> None:
        self._distributed.all_reduce(tensor)
        tensor /= self.size

    def gather(self, tensor: Tensor) -> Tensor:
        rows = self._on_device(tensor.contiguous().view(torch.uint8))
        lengths = [self._on_device(torch.zeros(1, dtype=torch.int64)) for _ in range(self.size)]
        self._distributed.all_gather(lengths, self._on_device(torch.tensor([len(rows)])))
        longest = int(torch.cat(lengths).max())
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._distributed.all_gather(parts, padded)
        joined = torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
        return joined.view(tensor.dtype)

    def gradients(self, network: nn.Module) -> Gradients:
        compression = self._training.compression
        if gradients.overlaps(self._training, network):
            return gradients.OverlappedByDdp(network, compression)
        dtype = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]

        def exchange(buffer: Tensor) -> None:
            exchanged = buffer.to(dtype) if dtype else buffer
            self.average(exchanged)
            if dtype:
                buffer.copy_(exchanged)

        return gradients.Flat(network, exchange)

    def close(self) -> None:
        self._distributed.destroy_process_group()

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if self._distributed.get_backend() == "nccl" else tensor
