from dataclasses import replace

import pytest

from app.config import Training
from app.errors import UserError
from app.training import preflight
from app.training.preflight import Machine, describe, faults

LAPTOP = Machine(
    python="3.11.9",
    torch="2.9.0+cpu",
    ray="2.50.0",
    horovod="0.28.1",
    horovod_operations=("gloo",),
    torch_backends=("gloo",),
    cuda=None,
    gpus=(),
    bf16=False,
    cores=2,
    memory_gib=16.0,
    shared_memory_gib=8.0,
)
SERVER = replace(
    LAPTOP,
    torch="2.9.0+cu128",
    horovod_operations=("gloo", "nccl"),
    torch_backends=("gloo", "nccl"),
    cuda="12.8",
    gpus=("A card",),
    bf16=True,
)
OLD = replace(SERVER, bf16=False)
CPU_HOROVOD = replace(SERVER, horovod_operations=("gloo",))
NO_HOROVOD = replace(LAPTOP, horovod=None, horovod_operations=())
NO_NCCL = replace(SERVER, torch_backends=("gloo",))
CPU_TORCH = replace(SERVER, cuda=None, gpus=(), bf16=False)


def training(**settings) -> Training:
    return Training(num_workers=2, epochs=1, batch_size=4, learning_rate=0.1, **settings)


ADASUM = {"horovod": {"adasum": True}}


@pytest.mark.parametrize(
    ("machine", "settings"),
    [
        (LAPTOP, {}),
        (LAPTOP, {"precision": "bf16"}),
        (LAPTOP, {"backend": "ddp"}),
        (NO_HOROVOD, {"backend": "ddp"}),
        (SERVER, {}),
        (SERVER, {"device": "cuda", "precision": "bf16"}),
        (SERVER, {"backend": "ddp", "device": "cuda"}),
        (SERVER, ADASUM),
        (replace(LAPTOP, horovod_operations=("gloo", "mpi")), ADASUM),
        (OLD, {"precision": "fp16"}),
        (OLD, {"precision": "bf16", "device": "cpu"}),
        (CPU_HOROVOD, {"device": "cpu"}),
        (CPU_HOROVOD, {"backend": "ddp"}),
        (NO_NCCL, {"backend": "ddp", "device": "cpu"}),
        (NO_NCCL, {}),
    ],
)
def test_a_machine_that_can_train_has_no_faults(machine, settings):
    assert faults(training(**settings), machine) == []


@pytest.mark.parametrize(
    ("machine", "settings", "key", "advice"),
    [
        (LAPTOP, {"device": "cuda"}, "training.device", "PyTorch 2.9.0+cpu was built without CUDA"),
        (replace(LAPTOP, cuda="12.8"), {"device": "cuda"}, "training.device", "PyTorch sees none"),
        (CPU_TORCH, {"device": "cuda", "backend": "ddp"}, "training.device", "set auto or cpu"),
        (NO_HOROVOD, {}, "training.backend", "run `make setup`, or set backend: ddp"),
        (CPU_HOROVOD, {}, "training.backend", "built with gloo, so GPUs would exchange"),
        (CPU_HOROVOD, {"device": "cuda"}, "training.backend", "nvcc"),
        (NO_NCCL, {"backend": "ddp"}, "training.backend", "install its CUDA build, or set device: cpu"),
        (LAPTOP, ADASUM, "training.horovod.adasum", "this one has gloo"),
        (OLD, {"precision": "bf16"}, "training.precision", "A card has no bf16; set fp16 or auto"),
    ],
)
def test_a_fault_names_the_key_and_what_to_do(machine, settings, key, advice):
    (fault,) = faults(training(**settings), machine)
    assert fault.startswith(f"{key}: ")
    assert advice in fault


def test_all_faults_are_reported_at_once():
    messages = faults(training(device="cuda", **ADASUM), NO_HOROVOD)
    assert [fault.partition(": ")[0] for fault in messages] == [
        "training.device",
        "training.backend",
        "training.horovod.adasum",
    ]


def test_a_training_that_does_not_fit_is_refused_and_one_that_does_is_not(monkeypatch):
    monkeypatch.setattr(preflight, "inspect", lambda: LAPTOP)
    preflight.require(training())
    with pytest.raises(UserError, match=r"training\.device: cuda needs a GPU(.|\n)*adasum"):
        preflight.require(training(device="cuda", **ADASUM))


def test_this_machine_can_be_inspected_and_described():
    machine = preflight.inspect()
    assert machine.horovod == "0.28.1"
    assert "gloo" in machine.horovod_operations
    assert machine.cores >= 1
    assert machine.memory_gib > 0
    lines = describe(machine)
    assert lines[1] == f"Horovod 0.28.1, built with {', '.join(machine.horovod_operations)}"
    assert describe(LAPTOP)[-1] == "GPUs: none"
    assert describe(SERVER)[-1] == "GPUs: A card (bf16)"
