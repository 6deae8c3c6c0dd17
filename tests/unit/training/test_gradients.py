import pytest
import torch
from torch import Tensor, nn

from app.config import Training
from app.training import gradients
from app.training.gradients import MIN_OVERLAPPED_PARAMETERS, Flat, Overlapped, overlaps


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(4, 3, padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1))

    def loss(self, x: Tensor, place: Tensor) -> Tensor:
        return self.layers(torch.cat([x, self.table(place)], dim=1)).sum()


BATCH = (torch.tensor([[0.1, 0.2], [0.3, -0.4]]), torch.tensor([1, 2]))


def flat(network: nn.Module, exchange=lambda buffer: None) -> Flat:
    return Flat(network, exchange)


def test_gradients_are_views_of_one_buffer_that_backward_fills():
    network, plain = Network(), Network()
    ours = flat(network)
    views = [p.grad for p in network.parameters()]
    ours.loss(*BATCH).backward()
    plain.loss(*BATCH).backward()
    for parameter, view, other in zip(network.parameters(), views, plain.parameters(), strict=True):
        assert parameter.grad is view, "backward must add to the view, not put another tensor in its place"
        assert torch.equal(view, other.grad)
    whole = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert torch.equal(ours.buffer, whole)

    ours.zero()
    assert not any(p.grad.any() for p in network.parameters())
    ours.loss(*BATCH).backward()
    assert torch.equal(ours.buffer, whole), "zero must clear the gradients of the step before"


def test_the_exchange_gets_the_buffer_and_the_optimizer_steps_from_it():
    network, plain = Network(), Network()
    ours = flat(network, exchange=lambda buffer: buffer.mul_(2))
    ours.loss(*BATCH).backward()
    ours.reduce()
    torch.optim.AdamW(network.parameters(), lr=0.1).step()
    (2 * plain.loss(*BATCH)).backward()
    torch.optim.AdamW(plain.parameters(), lr=0.1).step()
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_frozen_parameters_are_not_in_the_buffer():
    network = Network()
    network.table.weight.requires_grad_(False)
    size = sum(p.numel() for p in network.layers.parameters())
    assert flat(network).buffer.numel() == size
    assert network.table.weight.grad is None


class Exchange:
    """An exchange that doubles a buffer when it is awaited. It records names and sizes."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []

    def begin(self, buffer: Tensor, name: str):
        self.started.append((name, buffer.numel()))
        return lambda: buffer.mul_(2)


def overlapped(network: nn.Module, exchange: Exchange, bucket_bytes: int = 60) -> Overlapped:
    return Overlapped(network, bucket_bytes, exchange.begin)


def gradients_of(network: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in network.parameters()]


# In reverse: bias 1, weight 5, bias 5 | weight 25, too large for 60 bytes | table 12.
BUCKETS = [("layers.1.bias to layers.0.bias", 11), ("layers.0.weight", 25), ("table.weight", 12)]


def test_buckets_are_sent_during_the_backward_pass_and_become_the_gradients():
    network, plain, exchange = Network(), Network(), Exchange()
    ours = overlapped(network, exchange)
    for _ in range(2):
        exchange.started.clear()
        ours.zero()
        plain.zero_grad()
        with ours.accumulating(last=True):
            ours.loss(*BATCH).backward()
        assert exchange.started == BUCKETS, "all exchanges start before the first wait"
        ours.reduce()
        (2 * plain.loss(*BATCH)).backward()
        for one, other in zip(gradients_of(network), gradients_of(plain), strict=True):
            assert torch.equal(one, other)


def test_the_last_of_several_passes_sends_the_sum_of_all():
    network, plain, exchange = Network(), Network(), Exchange()
    ours = overlapped(network, exchange)
    for i in range(3):
        with ours.accumulating(last=i == 2):
            ours.loss(*BATCH).backward()
        assert exchange.started == (BUCKETS if i == 2 else [])
        plain.loss(*BATCH).backward()
    ours.reduce()
    for one, other in zip(gradients_of(network), gradients_of(plain), strict=True):
        assert torch.equal(one, 2 * other)


def test_a_parameter_that_the_loss_does_not_use_has_a_gradient_of_zero():
    network, exchange = Network(), Exchange()
    ours = overlapped(network, exchange)
    ours.loss(*BATCH).backward()
    ours.reduce()
    ours.zero()
    exchange.started.clear()
    network.layers(torch.ones(1, 5)).sum().backward()  # without the table
    assert exchange.started == BUCKETS[:2]
    ours.reduce()
    assert exchange.started == BUCKETS
    assert not network.table.weight.grad.any()


@pytest.mark.parametrize(
    ("bucket_bytes", "sizes"), [(0, [1, 5, 5, 25, 12]), (24, [6, 5, 25, 12]), (1000, [48])]
)
def test_buckets_are_filled_up_to_a_size(bucket_bytes, sizes):
    network, exchange = Network(), Exchange()
    ours = overlapped(network, exchange, bucket_bytes)
    ours.loss(*BATCH).backward()
    ours.reduce()
    assert [size for _, size in exchange.started] == sizes


def sized(count: int, frozen: int = 0) -> nn.Module:
    """A network of `count` trainable and `frozen` other parameters."""
    network = nn.ParameterList([nn.Parameter(torch.zeros(count)), nn.Parameter(torch.zeros(frozen))])
    network[1].requires_grad_(False)
    return network


@pytest.mark.parametrize("backend", ["horovod", "ddp"])
@pytest.mark.parametrize(
    ("size", "frozen", "expected"),
    [
        (MIN_OVERLAPPED_PARAMETERS - 1, 0, False),
        (MIN_OVERLAPPED_PARAMETERS, 0, True),
        (MIN_OVERLAPPED_PARAMETERS - 1, MIN_OVERLAPPED_PARAMETERS, False),
    ],
)
def test_auto_depends_on_the_number_of_trainable_parameters(backend, size, frozen, expected):
    assert overlaps(training(backend=backend), sized(size, frozen)) is expected


def test_a_setting_overrides_the_size(monkeypatch):
    monkeypatch.setattr(gradients, "MIN_OVERLAPPED_PARAMETERS", 5)
    assert overlaps(training(gradients="overlapped"), sized(4))
    assert not overlaps(training(gradients="flat"), sized(6))


def training(**settings) -> Training:
    return Training(num_workers=2, epochs=1, batch_size=4, learning_rate=0.1, **settings)
