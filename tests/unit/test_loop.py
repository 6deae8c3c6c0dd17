import itertools

import pytest
import torch

from app.config import Training
from app.training import loop
from app.training.checkpoint import Checkpoints
from app.training.loop import _begin_epoch, _precision, _resume, is_stale


def training(**settings) -> Training:
    return Training(num_workers=2, epochs=9, batch_size=4, learning_rate=0.1, **settings)


# The order of an epoch


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


def test_the_random_state_comes_back():
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    state = loop._random_state(cpu)
    drawn = torch.rand(3)
    torch.rand(5)
    loop._set_random_state(torch.stack([torch.zeros_like(state), state])[1], cpu)  # as of the second rank
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(1)
    loop._set_random_state(None, cpu)  # a rank that was none before: as the epoch seeded it
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision_on_the_cpu(wanted, dtype):
    assert _precision(wanted, torch.device("cpu")) is dtype


# Early stopping


@pytest.mark.parametrize(
    ("scores", "rule", "stale"),
    [
        ([], {"patience": 1}, False),
        ([0.5], {"patience": 1}, False),
        ([0.5, 0.5], {"patience": 1}, True),
        ([0.5, 0.6, 0.59, 0.58], {"patience": 2}, True),
        ([0.5, 0.6, 0.59, 0.58], {"patience": 3}, False),
        ([0.5, 0.4, 0.3, 0.51], {"patience": 3}, False),
        ([0.5, 0.51, 0.52, 0.53], {"patience": 3, "min_delta": 0.1}, True),
        # Small steps add up: each is held against the last that counted as better.
        ([0.5, 0.54, 0.58, 0.62], {"patience": 3, "min_delta": 0.1}, False),
    ],
)
def test_stale_is_what_has_not_got_better_for_so_many_epochs(scores, rule, stale):
    history = [{"epoch": i, "validation_auc": score} for i, score in enumerate(scores)]
    assert is_stale(training(early_stopping=rule), "auc", history) is stale
    assert not is_stale(training(), "auc", history)


# One rank alone: the step, and where a training goes on


class Alone:
    """The only rank, or one of several whose others are not asked."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def broadcast(self, tensors) -> None:
        pass


class Notes(list):
    note = list.append


def resume(folder, num_steps: int, rank: int = 0, size: int = 2):
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(network.parameters())
    notes = Notes()
    start = _resume(
        Checkpoints(folder, training().checkpoints),
        Alone(rank, size),
        notes,
        network,
        optimizer,
        torch.amp.GradScaler("cpu", enabled=False),
        num_steps,
    )
    return start, notes


@pytest.fixture
def halfway(tmp_path):
    """A checkpoint of two ranks, step 30 of 90 in the third epoch; their losses so far are 3 and 5."""
    checkpoints = Checkpoints(tmp_path, training().checkpoints)
    random = torch.stack([torch.full((4,), rank, dtype=torch.uint8) for rank in range(2)])
    groups = {
        "model": torch.nn.Linear(2, 1).state_dict(),
        "optimizer": {},
        "ranks": {"random": random, "loss": torch.tensor([3.0, 5.0])},
    }
    position = {"epoch": 2, "step": 30, "num_steps": 90, "score": None}
    checkpoints.save(groups, {**position, "history": [{"epoch": 0}, {"epoch": 1}], "scaler": {}})
    checkpoints.wait()
    return tmp_path


def test_without_a_checkpoint_it_begins_at_the_start(tmp_path):
    start, notes = resume(tmp_path, 90)
    assert (start.epoch, start.step, start.loss, start.history, notes) == (0, 0, 0.0, [], [])


def test_it_goes_on_where_the_checkpoint_was(halfway):
    start, notes = resume(halfway, 90)
    assert (start.epoch, start.step, start.loss, len(start.history)) == (2, 30, 3.0, 2)
    assert start.random.tolist() == [0, 0, 0, 0]
    assert notes == ["going on from epoch 3, step 30 of 90, 2 workers"]


@pytest.mark.parametrize(("size", "num_steps", "step"), [(1, 180, 60), (4, 45, 15), (3, 60, 20)])
def test_with_other_ranks_it_goes_on_at_the_same_share(halfway, size, num_steps, step):
    start, notes = resume(halfway, num_steps, size=size)
    assert (start.epoch, start.step) == (2, step)
    assert start.loss / start.step == pytest.approx(4.0 / 30), "the mean loss of a step stays"
    assert notes == [f"going on from epoch 3, step {step} of {num_steps}, {size} workers"]


def test_a_rank_that_was_none_has_no_random_state_to_take_up(halfway, monkeypatch):
    start = resume(halfway, 45, size=4)[0]
    assert start.random is not None
    monkeypatch.setattr(Alone, "broadcast", lambda self, tensors: tensors[0].copy_(torch.tensor([2, 30])))
    assert resume(halfway, 45, rank=3, size=4)[0].random is None


class Recorded:
    """Gradients of one process, which note the order in which they are asked."""

    def __init__(self, network, optimizer):
        self.network, self.optimizer, self.calls = network, optimizer, []

    def zero(self):
        self.optimizer.zero_grad()
        self.calls.append("zero")

    def loss(self, x, y):
        return (self.network(x).squeeze(1) - y).square().mean()

    def accumulating(self, last):
        self.calls.append("last" if last else "pass")
        return torch.enable_grad()

    def reduce(self):
        self.calls.append("reduce")

    def stepping(self):
        self.calls.append("step")
        return torch.no_grad()


def one_step(passes: int, clip_norm: float | None = None, lr_scale: float = 1.0):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD([{"params": network.parameters(), "lr_scale": lr_scale}])
    gradients = Recorded(network, optimizer)
    batches = list(
        zip(torch.randn(12, 3).split(12 // passes), torch.randn(12).split(12 // passes), strict=True)
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = loop._step(batches, gradients, scaler, 0.1, clip_norm, torch.float32)
    return loss, network.weight.detach() - before, gradients


def test_a_step_of_several_passes_is_that_of_one_batch_as_large():
    loss, change, gradients = one_step(1)
    assert gradients.calls == ["zero", "last", "reduce", "step"]
    many_loss, many_change, gradients = one_step(3)
    assert gradients.calls == ["zero", "pass", "pass", "last", "reduce", "step"]
    torch.testing.assert_close(many_loss, loss)
    torch.testing.assert_close(many_change, change)


def test_long_gradients_are_shortened_and_short_ones_are_not():
    _, free, gradients = one_step(1)
    norm = torch.nn.utils.get_total_norm([p.grad for p in gradients.network.parameters()]).item()
    _, clipped, _ = one_step(1, clip_norm=norm / 4)
    torch.testing.assert_close(clipped, free / 4, rtol=1e-4, atol=1e-6)
    _, loose, _ = one_step(1, clip_norm=norm * 4)
    torch.testing.assert_close(loose, free)


def test_a_group_may_have_its_own_share_of_the_learning_rate():
    torch.testing.assert_close(one_step(1, lr_scale=0.5)[1], 0.5 * one_step(1)[1])
