"""How the gradients of all ranks become their mean: in one buffer, or layer by layer as they are ready."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

from app.config import Training

OVERLAP_FROM = 2_000_000
"""Parameters from which the exchange is overlapped with the backward pass: below, what an exchange costs is
its start, not its bytes."""


def overlaps(training: Training, network: nn.Module) -> bool:
    """Whether the project, or the size of the network, asks for the overlapped exchange."""
    if training.gradients == "auto":
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


class Overlapped:
    """Gradients gathered in buckets, each averaged once the backward pass has filled it (Li et al., 2020).

    Horovod's own optimizer copies each gradient into a buffer and out of it again, and both copies wait for
    the exchange; here a gradient is copied once, and is a view of its bucket from then on.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        bucket_bytes: int,
        begin: Callable[[Tensor, str], Callable[[], None]],
    ):
        """`begin` begins to overwrite a bucket, float32, with the mean over the ranks, under a name that
        is its own; what it returns waits for the end of that. A gradient above `bucket_bytes` has one for
        itself.
        """
        self.optimizer = optimizer
        self._network = network
        self._begin = begin
        self._is_last = True
        self._finish: dict[int, Callable[[], None]] = {}
        # The gradients of the last layers come first.
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad][::-1]
        self._buckets = [_Bucket(dict(group)) for group in _grouped(named, bucket_bytes)]
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._ready, number))

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def loss(self, *batch: Tensor) -> Tensor:
        return self._network.loss(*batch)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._is_last = last
        yield

    def reduce(self) -> None:
        for number, bucket in enumerate(self._buckets):
            if number not in self._finish:  # a parameter had no part in the loss
                bucket.fill()
                self._send(number)
        for number in range(len(self._buckets)):
            self._finish.pop(number)()

    def stepping(self) -> AbstractContextManager:
        return nullcontext()

    def _ready(self, number: int, parameter: Tensor) -> None:
        if self._is_last and self._buckets[number].take(parameter):
            self._send(number)

    def _send(self, number: int) -> None:
        bucket = self._buckets[number]
        self._finish[number] = self._begin(bucket.buffer, bucket.name)


class _Bucket:
    """The buffer of a few gradients."""

    def __init__(self, parameters: dict[str, Tensor]):
        names, self.parameters = list(parameters), list(parameters.values())
        self.name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros(sum(sizes), device=self.parameters[0].device)
        self._places = {
            p: part.view_as(p) for p, part in zip(self.parameters, self.buffer.split(sizes), strict=True)
        }
        self._missing = set(self.parameters)

    def take(self, parameter: Tensor) -> bool:
        """Copy a gradient to its place, which takes its role; whether all are there now."""
        assert parameter.grad is not None
        parameter.grad = self._places[parameter].copy_(parameter.grad)
        self._missing.remove(parameter)
        return not self._missing and self._all_there()

    def fill(self) -> None:
        """Zeros for the gradients that are not there."""
        for parameter in self._missing:
            parameter.grad = self._places[parameter].zero_()
        self._all_there()

    def _all_there(self) -> bool:
        self._missing = set(self.parameters)  # of the next step
        return True


def _grouped(named: list[tuple[str, Tensor]], most_bytes: int) -> list[list[tuple[str, Tensor]]]:
    groups: list[list[tuple[str, Tensor]]] = []
    size = 0
    for name, parameter in named:
        size += (own := parameter.numel() * parameter.element_size())
        if size > most_bytes or not groups:
            groups.append([])
            size = own
        groups[-1].append((name, parameter))
    return groups


class OverlappedByDdp:
    """PyTorch's DistributedDataParallel: the same, by its own means."""

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
