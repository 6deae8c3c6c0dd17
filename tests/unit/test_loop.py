import itertools

import pytest
import torch

from app.data.features import Layout
from app.models.tabular import MultiLayerPerceptron
from app.training.loop import FlatGradients, _begin_epoch, _precision, cosine


def test_the_cosine_falls_from_the_peak_to_0():
    rates = [cosine(0.2, step, 100) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[50] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(before > after for before, after in itertools.pairwise(rates))


def test_an_epoch_is_determined_by_seed_epoch_and_rank():
    keys = list(itertools.product(range(3), repeat=3))
    orders = {key: _begin_epoch(*key, num_rows=50, length=50) for key in keys}
    for key in keys:
        torch.rand(3)  # whatever was drawn before
        assert torch.equal(_begin_epoch(*key, num_rows=50, length=50), orders[key])
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(keys)


def test_dropout_is_seeded_by_seed_epoch_and_rank_too():
    def drawn(*key: int) -> tuple[float, ...]:
        _begin_epoch(*key, num_rows=5, length=5)
        return tuple(torch.rand(4).tolist())

    keys = list(itertools.product(range(2), repeat=3))
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in keys] == first
    assert len(set(first)) == len(keys)


@pytest.mark.parametrize(("num_rows", "length"), [(10, 10), (10, 12), (3, 10), (1, 4), (10, 4)])
def test_an_order_has_every_row_once_and_then_the_first_ones_again(num_rows, length):
    order = _begin_epoch(0, 0, 0, num_rows, length).tolist()
    assert len(order) == length
    assert len(set(order[:num_rows])) == min(num_rows, length)
    assert all(0 <= row < num_rows for row in order)
    assert order[num_rows:] == order[: length - num_rows][: max(0, length - num_rows)]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return MultiLayerPerceptron(Layout(dense=2, embeddings=((4, 3),)), [5], dropout=0.0)


def backward(model: torch.nn.Module) -> None:
    model(torch.tensor([[0.1, 0.2, 1.0], [0.3, -0.4, 2.0]])).sum().backward()


def test_gradients_are_views_of_one_buffer_that_backward_fills():
    model, plain = network(), network()
    gradients = FlatGradients(model)
    views = [p.grad for p in model.parameters()]
    backward(model)
    backward(plain)
    for parameter, view, other in zip(model.parameters(), views, plain.parameters(), strict=True):
        assert parameter.grad is view, "backward must add to the view, not put another tensor in its place"
        assert torch.equal(view, other.grad)
    whole = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert torch.equal(gradients.buffer, whole)

    gradients.buffer *= 2
    assert all(
        torch.equal(p.grad, 2 * o.grad) for p, o in zip(model.parameters(), plain.parameters(), strict=True)
    )

    gradients.zero()
    assert not any(p.grad.any() for p in model.parameters())
    backward(model)
    assert torch.equal(gradients.buffer, whole), "zero must forget the step before"


def test_an_optimizer_steps_from_the_buffer():
    model, plain = network(), network()
    FlatGradients(model)
    for m in (model, plain):
        backward(m)
        torch.optim.AdamW(m.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_frozen_parameters_have_no_place_in_the_buffer():
    model = network()
    model.layers[0].weight.requires_grad_(False)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert FlatGradients(model).buffer.numel() == size
    assert model.layers[0].weight.grad is None


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision_on_the_cpu(wanted, dtype):
    assert _precision(wanted, torch.device("cpu")) is dtype
