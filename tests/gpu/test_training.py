"""Training on one GPU, by one rank and without Ray."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from app.training import checkpoint, collective, device, loop
from app.training.checkpoint import Checkpoints
from app.training.collective import Alone
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
    poll_interval_s = 0.0

    def __init__(self, num_steps: int):
        self._left = num_steps

    def step(self, epoch, step):
        self._left -= 1

    def request(self):
        return Request.STOP if self._left == 0 else Request.NONE


def train(prepared, run: Path, where: torch.device, *, ranks=None, observer=None, dropout=0.2, **training):
    """The parameters at the end, and the history without times."""
    project = tabular.project(**training)
    model = project.model.model_copy(update={"dropout": dropout})
    project = project.model_copy(update={"model": model})
    network = loop.train(project, prepared, run, ranks or Alone(), observer or Observer(), where)
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


def test_fp32_on_the_gpu_learns_what_the_cpu_learns(prepared, tmp_path):
    _, on_cpu = train(prepared, tmp_path / "cpu", CPU, dropout=0.0, precision="fp32")
    _, on_gpu = train(prepared, tmp_path / "gpu", GPU, dropout=0.0, precision="fp32")
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other == pytest.approx(one, rel=0, abs=2e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_learn_too(prepared, tmp_path, precision):
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


@contextlib.contextmanager
def only_rank(backend: str, folder: Path, **training):
    """A group of one rank over NCCL: no library lets two ranks share a GPU."""
    settings = tabular.project(backend=backend, **training).training
    if backend == "horovod":
        hvd = pytest.importorskip("horovod.torch")
        if not hvd.nccl_built():
            pytest.skip("Horovod was built without NCCL")
        ranks = collective.Horovod(settings, Path(os.devnull))
    else:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("nccl", store, rank=0, world_size=1, device_id=GPU)
        ranks = collective.TorchDistributed(settings)
    try:
        yield ranks
    finally:
        ranks.close()


@pytest.mark.parametrize("backend", ["horovod", "ddp"])
def test_collective_operations_over_nccl(tmp_path, backend):
    with only_rank(backend, tmp_path) as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        for tensor in (
            torch.arange(6, device=GPU).view(3, 2),
            torch.rand(4),
            torch.tensor([True], device=GPU),
        ):
            gathered = ranks.gather(tensor)
            assert gathered.dtype == tensor.dtype
            assert torch.equal(gathered.cpu(), tensor.cpu())
            same = tensor.clone()
            ranks.broadcast([same])
            assert torch.equal(same, tensor)
        mean = torch.tensor([2.0, 4.0], device=GPU)
        ranks.average(mean)
        assert mean.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("backend", ["horovod", "ddp"])
@pytest.mark.parametrize("gradients", ["flat", "overlapped"])
@pytest.mark.parametrize(("compression", "tolerance"), [("none", 1e-5), ("fp16", 0.02), ("bf16", 0.05)])
def test_one_rank_over_nccl_learns_what_one_alone_learns(
    prepared, tmp_path, backend, gradients, compression, tolerance
):
    settings = {"precision": "fp32", "deterministic": True, "epochs": 1}
    exchange = {"gradients": gradients, "compression": compression}
    _, (alone,) = train(prepared, tmp_path / "alone", GPU, **settings)
    with only_rank(backend, tmp_path, **exchange) as ranks:
        _, (history,) = train(
            prepared, tmp_path / "nccl", GPU, ranks=ranks, backend=backend, **settings, **exchange
        )
    assert history == pytest.approx(alone, rel=0, abs=tolerance)
