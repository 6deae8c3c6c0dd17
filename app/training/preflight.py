"""Whether this machine can train a project, and what to change if it cannot."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.config import Training
from app.errors import UserError

BUILD_WITH_NCCL = "on a machine with a GPU and `nvcc` (CUDA toolkit), remove .venv and run `make setup`"


@dataclass(frozen=True)
class Machine:
    """Libraries, devices and memory of a machine."""

    python: str
    torch: str
    ray: str
    horovod: str | None
    """Version of Horovod, or None if it cannot be imported."""
    horovod_operations: tuple[str, ...]
    """Operations that Horovod was built with: gloo, nccl, mpi."""
    torch_backends: tuple[str, ...]
    """Backends that torch.distributed has: gloo, nccl."""
    cuda: str | None
    """Version of CUDA that PyTorch was built for, or None."""
    gpus: tuple[str, ...]
    """Name of each GPU."""
    bf16: bool
    """Whether the GPUs compute in bfloat16."""
    cores: int
    """Number of CPU cores that this process may use."""
    memory_gib: float
    shared_memory_gib: float
    """Size of /dev/shm, where Ray stores objects."""


def inspect() -> Machine:
    """Inspect this machine. Takes seconds, because it imports PyTorch and Horovod."""
    import torch
    from torch import distributed

    operations, version = [], None
    try:
        import horovod.torch as hvd
    except ImportError:
        pass
    else:
        version = importlib.metadata.version("horovod")
        built = {"gloo": hvd.gloo_built(), "nccl": hvd.nccl_built(), "mpi": hvd.mpi_built()}
        operations = [name for name, is_built in built.items() if is_built]
    available = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    shm = Path("/dev/shm")
    return Machine(
        python=platform.python_version(),
        torch=torch.__version__,
        ray=importlib.metadata.version("ray"),
        horovod=version,
        horovod_operations=tuple(operations),
        torch_backends=tuple(name for name, is_available in available.items() if is_available),
        cuda=torch.version.cuda,
        gpus=tuple(gpus),
        bf16=bool(gpus) and torch.cuda.is_bf16_supported(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        shared_memory_gib=round(psutil.disk_usage(str(shm if shm.is_dir() else Path.cwd())).total / 2**30, 1),
    )


def faults(training: Training, machine: Machine) -> list[str]:
    """A message for each thing that the project needs and the machine lacks, with the key and what to do."""
    messages = []
    on_gpu = training.device == "cuda" or (training.device == "auto" and bool(machine.gpus))
    if training.device == "cuda" and not machine.gpus:
        why = "PyTorch sees none" if machine.cuda else f"PyTorch {machine.torch} was built without CUDA"
        messages.append(f"training.device: cuda needs a GPU, but {why}; set auto or cpu")
    if training.backend == "horovod":
        if machine.horovod is None:
            messages.append(
                "training.backend: Horovod cannot be imported; run `make setup`, or set backend: ddp"
            )
        elif on_gpu and machine.gpus and "nccl" not in machine.horovod_operations:
            messages.append(
                f"training.backend: Horovod was built with {', '.join(machine.horovod_operations)}, so GPUs "
                f"would exchange gradients through the CPU; {BUILD_WITH_NCCL}, or set backend: ddp"
            )
        if training.horovod.adasum and not {"mpi", "nccl"} & set(machine.horovod_operations):
            messages.append(
                "training.horovod.adasum: needs Horovod built with MPI or NCCL, and this one has "
                f"{', '.join(machine.horovod_operations) or 'neither'}; {BUILD_WITH_NCCL}, or leave it out"
            )
    elif on_gpu and machine.gpus and "nccl" not in machine.torch_backends:
        messages.append("training.backend: PyTorch has no NCCL; install its CUDA build, or set device: cpu")
    if training.precision == "bf16" and on_gpu and machine.gpus and not machine.bf16:
        messages.append(f"training.precision: {machine.gpus[0]} has no bf16; set fp16 or auto")
    return messages


def require(training: Training) -> None:
    """Raise UserError with all faults of this machine.

    Skips the inspection for a training on the CPU without Adasum, which the installation always supports.
    """
    needs_inspection = training.device != "cpu" or training.horovod.adasum
    if needs_inspection and (messages := faults(training, inspect())):
        raise UserError("\n".join(messages))


def describe(machine: Machine) -> list[str]:
    """The machine in lines for the user."""
    gpus = ", ".join(machine.gpus) or "none"
    operations = ", ".join(machine.horovod_operations) or "nothing"
    memory = f"{machine.memory_gib:g} GiB memory, {machine.shared_memory_gib:g} GiB /dev/shm"
    return [
        f"Python {machine.python}, PyTorch {machine.torch} (CUDA {machine.cuda or 'no'}), Ray {machine.ray}",
        f"Horovod {machine.horovod or 'missing'}, built with {operations}",
        f"torch.distributed with {', '.join(machine.torch_backends)}",
        f"{machine.cores} cores, {memory}",
        f"GPUs: {gpus}{' (bf16)' if machine.bf16 else ''}",
    ]
