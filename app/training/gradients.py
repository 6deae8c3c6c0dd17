"""Averaging the gradients over all ranks: in one buffer after the backward pass, or in buckets during it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

from app.config import Training

MIN_OVERLAPPED_PARAMETERS = 2_000_000
"""Number of parameters from which `gradients: auto` overlaps the exchange with the backward pass. In a
smaller network the latency of an exchange costs more than its bytes, so one exchange is faster than
several."""


def overlaps(training: Training, network: nn.Module) -> bool:
    """Whether the exchange overlaps the backward pass: by `training.gradients`, or by the network's size."""
    if training.gradients == "auto":
        return sum(p.numel() for p in network.parameters() if p.requires_grad) >= MIN_OVERLAPPED_PARAMETERS
    return training.gradients == "overlapped"


class Gradients(Protocol):
    """The gradients of one network on one rank.

    Each step calls `zero`, then `loss` and its backward pass inside `accumulating`, once or several times,
    and then `reduce`.
    """

    def zero(self) -> None:
        """Clear the gradients of the previous step."""

    def loss(self, *batch: Tensor) -> Tensor:
        """The network's loss of a batch, float32 (); its backward pass adds to the gradients."""

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Context of one forward and backward pass. The ranks exchange gradients after the `last` one."""

    def reduce(self) -> None:
        """Wait until every parameter's `.grad` is the mean over the ranks."""


class Flat:
    """All gradients as views of one buffer, which a single exchange averages over the ranks.

    Best for small networks: the latency of an exchange for each gradient would cost more than the bytes.
    """

    def __init__(self, network: nn.Module, exchange: Callable[[Tensor], None]):
        """`exchange` overwrites a buffer, float32 (parameters,), with its mean over the ranks."""
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


class Overlapped:
    """Gradients in buckets; each bucket is averaged once the backward pass has filled it (Li et al., 2020).

    Horovod's own optimizer copies each gradient into a buffer and back, and both copies wait for the
    exchange. Here a gradient is copied once and is a view of its bucket from then on.
    """

    def __init__(
        self,
        network: nn.Module,
        bucket_bytes: int,
        begin_exchange: Callable[[Tensor, str], Callable[[], None]],
    ):
        """`begin_exchange(buffer, name)` starts to overwrite a bucket, float32 (parameters,), with its mean
        over the ranks, and returns a function that waits for its end. Names are unique. A gradient of more
        than `bucket_bytes` has a bucket of its own.
        """
        self._network = network
        self._begin_exchange = begin_exchange
        self._is_last = True
        self._pending: dict[int, Callable[[], None]] = {}
        # Reversed, because the backward pass computes the gradients of the last layers first.
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad][::-1]
        self._buckets = [_Bucket(dict(group)) for group in _grouped(named, bucket_bytes)]
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, number))

    def zero(self) -> None:
        self._network.zero_grad()

    def loss(self, *batch: Tensor) -> Tensor:
        return self._network.loss(*batch)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._is_last = last
        yield

    def reduce(self) -> None:
        for number, bucket in enumerate(self._buckets):
            if number not in self._pending:  # the loss does not depend on one of its parameters
                bucket.fill_missing()
                self._send(number)
        for number in range(len(self._buckets)):
            self._pending.pop(number)()

    def _on_gradient(self, number: int, parameter: Tensor) -> None:
        if self._is_last and self._buckets[number].add(parameter):
            self._send(number)

    def _send(self, number: int) -> None:
        bucket = self._buckets[number]
        self._pending[number] = self._begin_exchange(bucket.buffer, bucket.name)


class _Bucket:
    """A buffer that holds the gradients of a few parameters."""

    def __init__(self, parameters: dict[str, Tensor]):
        names, self.parameters = list(parameters), list(parameters.values())
        self.name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros(sum(sizes), device=self.parameters[0].device)
        self._views = {
            p: part.view_as(p) for p, part in zip(self.parameters, self.buffer.split(sizes), strict=True)
        }
        self._missing = set(self.parameters)

    def add(self, parameter: Tensor) -> bool:
        """Copy a parameter's gradient into the buffer and make the gradient a view of it.

        Returns whether the bucket now has all its gradients.
        """
        assert parameter.grad is not None
        parameter.grad = self._views[parameter].copy_(parameter.grad)
        self._missing.remove(parameter)
        if self._missing:
            return False
        self._missing = set(self.parameters)  # for the next step
        return True

    def fill_missing(self) -> None:
        """Set the gradients that the backward pass did not compute to zero."""
        for parameter in self._missing:
            parameter.grad = self._views[parameter].zero_()
        self._missing = set(self.parameters)


def _grouped(named: list[tuple[str, Tensor]], max_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """Neighbouring parameters in groups of at most `max_bytes`; a larger parameter is a group of its own."""
    groups: list[list[tuple[str, Tensor]]] = []
    group_bytes = 0
    for name, parameter in named:
        parameter_bytes = parameter.numel() * parameter.element_size()
        group_bytes += parameter_bytes
        if group_bytes > max_bytes or not groups:
            groups.append([])
            group_bytes = parameter_bytes
        groups[-1].append((name, parameter))
    return groups


class OverlappedByDdp:
    """The overlapped exchange of PyTorch's DistributedDataParallel."""

    def __init__(self, network: nn.Module, compression: str):
        from torch.nn.parallel import DistributedDataParallel

        self._network = network
        self._ddp = DistributedDataParallel(_Loss(network), gradient_as_bucket_view=True)
        if compression != "none":
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[compression]
            self._ddp.register_comm_hook(dtype, _average_compressed)

    def zero(self) -> None:
        self._network.zero_grad()

    def loss(self, *batch: Tensor) -> Tensor:
        return self._ddp(*batch)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self._ddp.no_sync():
            yield

    def reduce(self) -> None:
        """Do nothing: DistributedDataParallel's backward pass waits for the exchange."""


class _Loss(nn.Module):
    """The network's loss as a forward pass, which is the method that DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *batch: Tensor) -> Tensor:
        return self.network.loss(*batch)


def _average_compressed(dtype: torch.dtype, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook that exchanges a bucket in 16 bits. PyTorch's own bfloat16 hook refuses Gloo."""
    compressed = bucket.buffer().to(dtype).div_(distributed.get_world_size())
    exchange = distributed.all_reduce(compressed, async_op=True).get_future()
    return exchange.then(lambda future: bucket.buffer().copy_(future.value()[0]))
