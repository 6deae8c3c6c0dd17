"""Collective operations and gradients of two real processes, over each backend."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.config import Training
from app.errors import UserError
from app.training import collective, preflight
from tests.ranks import pair

pytestmark = pytest.mark.integration
BACKENDS = ("horovod", "ddp")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


HOROVOD_ALONE = pytest.mark.parametrize("backend", ["horovod"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def ranks(backend, tmp_path_factory):
    with pair(backend, tmp_path_factory.mktemp(backend)) as both:
        yield both


def settings(backend: str, **others) -> Training:
    return Training(backend=backend, num_workers=2, epochs=1, batch_size=BATCH, learning_rate=RATE, **others)


# Tests run in this process, the `_on_rank` functions in each rank.

NUMBERS = (torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.bool)


def numbers(rank: int, length: int, dtype: torch.dtype, *width: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 100, (length, *width), generator=generator).to(dtype)


def exchange_on_rank(training: Training) -> dict:
    group = collective.join(training, Path(os.devnull))
    overwritten = [numbers(group.rank, 4, torch.int64), torch.full((2, 2), float(group.rank))]
    group.broadcast(overwritten)
    mean = torch.tensor([1.0, 10.0]) * (group.rank + 1)
    group.average(mean)
    lengths = {"same": (3, 3), "different": (5, 2), "none on one": (0, 4), "none at all": (0, 0)}
    gathered = {
        (case, dtype): group.gather(numbers(group.rank, lengths[case][group.rank], dtype, 3))
        for case in lengths
        for dtype in NUMBERS
    }
    return {
        "rank and size": (group.rank, group.size),
        "broadcast": overwritten,
        "average": mean,
        "gather": gathered,
        "lengths": lengths,
    }


@pytest.fixture(scope="module")
def exchanged(backend, ranks):
    return ranks(exchange_on_rank, settings(backend))


def test_each_rank_has_its_rank_and_the_size_of_the_group(exchanged):
    assert [answer["rank and size"] for answer in exchanged] == [(0, 2), (1, 2)]


def test_broadcast_overwrites_tensors_with_those_of_rank_0(exchanged):
    for answer in exchanged:
        assert torch.equal(answer["broadcast"][0], numbers(0, 4, torch.int64))
        assert torch.equal(answer["broadcast"][1], torch.zeros(2, 2))


def test_average_is_the_mean_over_the_ranks(exchanged):
    for answer in exchanged:
        assert answer["average"].tolist() == [1.5, 15.0]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("case", ["same", "different", "none on one", "none at all"])
def test_gather_joins_rows_in_the_order_of_the_ranks(exchanged, case, dtype):
    lengths = exchanged[0]["lengths"][case]
    whole = torch.cat([numbers(rank, length, dtype, 3) for rank, length in enumerate(lengths)])
    for answer in exchanged:
        gathered = answer["gather"][case, dtype]
        assert gathered.dtype == dtype
        assert torch.equal(gathered, whole)


# Gradients

BATCH, RATE, STEPS = 4, 0.05, 3


class Network(nn.Module):
    """A small network with an embedding; a batch uses only some of its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 3)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def loss(self, x: Tensor, index: Tensor, y: Tensor) -> Tensor:
        inputs = torch.cat([x, self.table(index)], dim=1)
        return (self.layers(inputs).squeeze(1) - y).square().mean()


def batch(rank: int, step: int, passes: int = 1) -> list[tuple[Tensor, ...]]:
    """The batches of a rank in one step, one per backward pass."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(passes * BATCH, 2, generator=generator)
    index = torch.randint(0, 7, (passes * BATCH,), generator=generator)
    y = torch.randn(passes * BATCH, generator=generator)
    return list(zip(x.split(BATCH), index.split(BATCH), y.split(BATCH), strict=True))


def train_on_rank(training: Training) -> list[Tensor]:
    """Steps as the loop takes them; returns the gradients of each step, and the parameters at the end."""
    group = collective.join(training, Path(os.devnull))
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    gradients = group.gradients(network)
    passes, gradients_by_step = training.backward_passes_per_step, []
    for step in range(STEPS):
        gradients.zero()
        for i, one in enumerate(batch(group.rank, step, passes)):
            with gradients.accumulating(last=i == passes - 1):
                (gradients.loss(*one) / passes).backward()
        gradients.reduce()
        gradients_by_step.append(flat(p.grad for p in network.parameters()))
        optimizer.step()
    return [*gradients_by_step, flat(p.detach() for p in network.parameters())]


def train_with_library_on_rank(training: Training) -> list[Tensor]:
    """The same steps with the optimizer or wrapper of Horovod or PyTorch itself."""
    rank = collective.join(training, Path(os.devnull)).rank
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    loss = network.loss
    if training.backend == "horovod":
        import horovod.torch as hvd

        optimizer = hvd.DistributedOptimizer(optimizer, network.named_parameters(prefix="theirs"))
    else:
        network.forward = network.loss
        loss = nn.parallel.DistributedDataParallel(network)
    gradients_by_step = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(*batch(rank, step)[0]).backward()
        if training.backend == "horovod":
            optimizer.synchronize()
            gradients_by_step.append(flat(p.grad for p in network.parameters()))
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            gradients_by_step.append(flat(p.grad for p in network.parameters()))
            optimizer.step()
    return [*gradients_by_step, flat(p.detach() for p in network.parameters())]


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten().clone() for tensor in tensors])


def train_in_one_process(passes: int = 1) -> list[Tensor]:
    """The same steps in one process with the rows of both ranks in one batch."""
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    gradients_by_step = []
    for step in range(STEPS):
        pieces = [one for rank in range(2) for one in batch(rank, step, passes)]
        optimizer.zero_grad()
        network.loss(*(torch.cat(part) for part in zip(*pieces, strict=True))).backward()
        gradients_by_step.append(flat(p.grad for p in network.parameters()))
        optimizer.step()
    return [*gradients_by_step, flat(p.detach() for p in network.parameters())]


def check_equal(answers: list[list[Tensor]], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs), "the ranks must have the same bits"
    for ours, other in zip(answers[0], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("gradients", ["flat", "overlapped"])
def test_gradients_are_those_of_one_process_with_all_the_rows(backend, ranks, gradients, passes):
    training = settings(backend, gradients=gradients, backward_passes_per_step=passes)
    check_equal(ranks(train_on_rank, training), train_in_one_process(passes))


@HOROVOD_ALONE
@pytest.mark.parametrize("megabytes", [0, 1e-4])
def test_small_buckets_give_the_same_gradients(ranks, megabytes):
    """Buckets of 0 bytes (one for each gradient) and of a hundred bytes."""
    training = settings("horovod", gradients="overlapped", horovod={"fusion_threshold_mb": megabytes})
    check_equal(ranks(train_on_rank, training), train_in_one_process())


@HOROVOD_ALONE
def test_autotune_gives_the_same_gradients(ranks):
    training = settings("horovod", gradients="overlapped", horovod={"autotune": True})
    check_equal(ranks(train_on_rank, training), train_in_one_process())


@pytest.mark.parametrize("gradients", ["flat", "overlapped"])
def test_gradients_are_those_of_the_librarys_own_optimizer(backend, ranks, gradients):
    theirs, _ = ranks(train_with_library_on_rank, settings(backend))
    check_equal(ranks(train_on_rank, settings(backend, gradients=gradients)), theirs)


@pytest.mark.parametrize("gradients", ["flat", "overlapped"])
@pytest.mark.parametrize(("compression", "precision"), [("fp16", 2**-10), ("bf16", 2**-7)])
def test_compressed_gradients_are_close_but_not_the_same(backend, ranks, gradients, compression, precision):
    answers = ranks(train_on_rank, settings(backend, gradients=gradients, compression=compression))
    assert torch.equal(answers[0][-1], answers[1][-1])
    exact, ours = train_in_one_process()[0], answers[0][0]
    assert not torch.equal(ours, exact), "nothing was compressed"
    torch.testing.assert_close(ours, exact, rtol=0, atol=precision * exact.abs().max().item())


def test_adasum_is_refused_without_mpi_and_nccl():
    with pytest.raises(UserError, match=r"training\.horovod\.adasum: needs Horovod built with MPI or NCCL"):
        preflight.require(settings("horovod", device="cpu", horovod={"adasum": True}))
