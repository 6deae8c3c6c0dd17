"""Training on one GPU with one rank and without Ray."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from app.data.prepare import Prepared
from app.training import checkpoint, collective, device, loop
from app.training.checkpoint import Checkpoints
from app.training.collective import Alone, Collective
from app.training.observer import Observer, Request
from tests import tabular

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tabular.prepared(tmp_path_factory.mktemp("stages") / "prepared")


class StopAfter(Observer):
    """Requests a stop after a number of steps."""

    poll_interval_s = 0.0

    def __init__(self, num_steps: int):
        self._remaining = num_steps

    def step(self, epoch, step):
        self._remaining -= 1

    def request(self):
        return Request.STOP if self._remaining == 0 else Request.NONE


def train(
    prepared, run: Path, torch_device: torch.device, *, ranks=None, observer=None, dropout=0.2, **training
):
    """The parameters at the end, and the history without times."""
    project = tabular.project(**training)
    model = project.model.model_copy(update={"dropout": dropout})
    project = project.model_copy(update={"model": model})
    network = loop.train(project, prepared, run, ranks or Alone(), observer or Observer(), torch_device)
    latest = Checkpoints(run / "checkpoints", project.training.checkpoints).latest(pytest.fail)
    history = checkpoint.read_state(latest)["history"]
    parameters = torch.cat([p.detach().flatten().cpu() for p in network.parameters()])
    return parameters, [{k: v for k, v in e.items() if k != "rows_per_s"} for e in history]


def test_the_random_states_of_cpu_and_gpu_are_restored():
    torch.manual_seed(1)
    state = device.random_state(GPU)
    drawn = torch.rand(3), torch.rand(3, device=GPU)
    torch.rand(5), torch.rand(5, device=GPU)
    device.restore_random_state(state, GPU)
    assert torch.equal(torch.rand(3), drawn[0])
    assert torch.equal(torch.rand(3, device=GPU), drawn[1])


def test_fp32_on_the_gpu_has_the_history_of_the_cpu(prepared, tmp_path):
    _, on_cpu = train(prepared, tmp_path / "cpu", CPU, dropout=0.0, precision="fp32")
    _, on_gpu = train(prepared, tmp_path / "gpu", GPU, dropout=0.0, precision="fp32")
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other == pytest.approx(one, rel=0, abs=2e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_precisions_learn(prepared, tmp_path, precision):
    _, history = train(prepared, tmp_path, GPU, precision=precision)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["validation_auc"] > 0.8


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("after", [4, 9, 13])
def test_an_interrupted_training_resumes_to_the_same_bits(prepared, tmp_path, precision, after):
    settings = {"precision": precision, "deterministic": True}
    parameters, history = train(prepared, tmp_path / "whole", GPU, **settings)
    train(prepared, tmp_path / "parts", GPU, observer=StopAfter(after), **settings)
    resumed_parameters, resumed_history = train(prepared, tmp_path / "parts", GPU, **settings)
    assert torch.equal(resumed_parameters, parameters)
    assert resumed_history == history


# One rank over NCCL, which does not let two ranks share a GPU. A process can join a group only once, so each
# test starts its own.


def run_in_new_process(function, *arguments):
    """Run a function of this module in a new process. If it returns a string, skip with that reason."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        result = executor.submit(function, *arguments).result()
    if isinstance(result, str):
        pytest.skip(result)
    return result


def join(backend: str, folder: Path, **training) -> Collective | None:
    """A group of one rank; None if Horovod has no NCCL."""
    settings = tabular.project(backend=backend, **training).training
    if backend == "horovod":
        import horovod.torch as hvd

        return collective.Horovod(settings, Path(os.devnull)) if hvd.nccl_built() else None
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("nccl", store, rank=0, world_size=1, device_id=GPU)
    return collective.TorchDistributed(settings)


NO_NCCL = "Horovod was built without NCCL"


def exchange_on_rank(backend: str, folder: Path):
    """The group's rank and size, the pairs of tensors that must be equal, and a mean of (2, 4)."""
    if (ranks := join(backend, folder)) is None:
        return NO_NCCL
    on_gpu = torch.arange(6, device=GPU).view(3, 2)
    pairs = []
    for tensor in (on_gpu, on_gpu > 2, torch.rand(4)):
        pairs += [(ranks.gather(tensor).cpu().numpy(), tensor.cpu().numpy())]
    for tensor in (on_gpu, torch.rand(4)):
        copy = tensor.clone()
        ranks.broadcast([copy])
        pairs += [(copy.cpu().numpy(), tensor.cpu().numpy())]
    mean = torch.tensor([2.0, 4.0], device=GPU)
    ranks.average(mean)
    return ranks.rank, ranks.size, pairs, mean.tolist()


@pytest.mark.parametrize("backend", ["horovod", "ddp"])
def test_collective_operations_over_nccl(tmp_path, backend):
    rank, size, pairs, mean = run_in_new_process(exchange_on_rank, backend, tmp_path)
    assert (rank, size) == (0, 1)
    for result, expected in pairs:
        assert result.dtype == expected.dtype
        assert (result == expected).all()
    assert mean == [2.0, 4.0]


def train_on_rank(prepared: Path, folder: Path, backend: str, settings: dict):
    """Train over NCCL; returns the history."""
    if (ranks := join(backend, folder, **settings)) is None:
        return NO_NCCL
    project = {"backend": backend, **settings}
    return train(Prepared(prepared, cached=True), folder / "nccl", GPU, ranks=ranks, **project)[1]


@pytest.mark.parametrize("backend", ["horovod", "ddp"])
@pytest.mark.parametrize("gradients", ["flat", "overlapped"])
@pytest.mark.parametrize(("compression", "tolerance"), [("none", 1e-5), ("fp16", 0.02), ("bf16", 0.05)])
def test_one_rank_over_nccl_has_the_history_of_a_training_without_a_group(
    prepared, tmp_path, backend, gradients, compression, tolerance
):
    settings = {"precision": "fp32", "deterministic": True, "epochs": 1}
    _, (alone,) = train(prepared, tmp_path / "alone", GPU, **settings)
    settings |= {"gradients": gradients, "compression": compression}
    (history,) = run_in_new_process(train_on_rank, prepared.path, tmp_path, backend, settings)
    assert history == pytest.approx(alone, rel=0, abs=tolerance)
