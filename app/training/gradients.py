"""How the gradients of all ranks become their mean: in one buffer, or layer by layer as they are ready."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from app.config import Training

OVERLAP_FROM = 2_000_000
"""Parameters from which the exchange is overlapped with the backward pass: below, what an exchange costs is
its start, not its bytes."""


def overlaps(training: Training, network: nn.Module) -> bool:
    """Whether the project, or the size of the network, asks for the overlapped exchange."""
    if training.gradients == "auto":
        if training.backend == "horovod" and training.compression == "bf16":
            return False  # Horovod's optimizer has no bfloat16
        return sum(p.numel() for p in network.parameters() if p.requires_grad) >= OVERLAP_FROM
    return training.gradients == "overlapped"


class Gradients(Protocol):
    """Goes through each step in this order: `zero`, passes under `accumulating`, `reduce`, `stepping`."""

    optimizer: torch.optim.Optimizer
    """The one to step, to save and to restore."""

    def zero(self) -> None: ...

    def loss(self, *batch: Tensor) -> Tensor:
        """The network's loss of a batch, whose backward pass fills the gradients."""

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a pass; `last` is the one after which the ranks exchange."""

    def reduce(self) -> None:
        """Returns when every parameter's `.grad` is the mean over the ranks."""

    def stepping(self) -> AbstractContextManager:
        """Around the optimizer's step."""


class Flat:
    """All gradients as views of one buffer, averaged over the ranks by a single exchange.

    A small model has many small gradients, and what each exchange costs is its start, not its bytes.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, exchange: Callable[[Tensor], None]
    ):
        """`exchange` overwrites the buffer, float32 (parameters,), with the mean over the ranks."""
        self.optimizer = optimizer
        self._network = network
        self._exchange = exchange
        parameters = [p for p in network.parameters() if p.requires_grad]
        sizes = [p.numel() for p in parameters]
        self.buffer = torch.zeros(sum(sizes), device=parameters[0].device)
        for parameter, part in zip(parameters, self.buffer.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        self.buffer.zero_()

    def loss(self, *batch: Tensor) -> Tensor:
        return self._network.loss(*batch)

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def reduce(self) -> None:
        self._exchange(self.buffer)

    def stepping(self) -> AbstractContextManager:
        return nullcontext()


class OverlappedByHorovod:
    """Horovod's DistributedOptimizer: a gradient is sent as soon as the backward pass has made it."""

    def __init__(self, network: nn.Module, optimizer: Any):
        self.optimizer = optimizer
        self._network = network

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def loss(self, *batch: Tensor) -> Tensor:
        return self._network.loss(*batch)

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext()  # it counts the passes itself

    def reduce(self) -> None:
        self.optimizer.synchronize()

    def stepping(self) -> AbstractContextManager:
        return self.optimizer.skip_synchronize()


class OverlappedByDdp:
    """PyTorch's DistributedDataParallel (Li et al., 2020): the same, in buckets."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, compression: str):
        from torch.nn.parallel import DistributedDataParallel

        self.optimizer = optimizer
        self._wrapped = DistributedDataParallel(_Loss(network), gradient_as_bucket_view=True)
        if compression != "none":
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[compression]
            self._wrapped.register_comm_hook(dtype, _average_in)

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def loss(self, *batch: Tensor) -> Tensor:
        return self._wrapped(*batch)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self._wrapped.no_sync():
            yield

    def reduce(self) -> None:
        """Nothing is left to do: the backward pass has waited for the exchange."""

    def stepping(self) -> AbstractContextManager:
        return nullcontext()


class _Loss(nn.Module):
    """The loss as a forward pass, where DistributedDataParallel can see it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *batch: Tensor) -> Tensor:
        return self.network.loss(*batch)


def _average_in(dtype: torch.dtype, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook as PyTorch's own, whose bfloat16 one refuses Gloo."""
    small = bucket.buffer().to(dtype).div_(distributed.get_world_size())
    sent = distributed.all_reduce(small, async_op=True).get_future()
    return sent.then(lambda future: bucket.buffer().copy_(future.value()[0]))
