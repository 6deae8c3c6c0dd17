"""How a rank computes: threads, determinism, precision, and the state of the random generators."""

import os

import torch
from torch import Tensor

from app.config import Training


def configure(training: Training) -> None:
    """Use one CPU thread, and deterministic algorithms if `training.deterministic` is set."""
    torch.set_num_threads(1)
    if training.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def precision(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of forward passes for `training.precision`."""
    if setting == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]


def random_state(device: torch.device) -> Tensor:
    """The states of torch's global generators, uint8 (bytes,): the CPU's, then that of a GPU."""
    state = torch.get_rng_state()
    return state if device.type == "cpu" else torch.cat([state, torch.cuda.get_rng_state(device)])


def restore_random_state(state: Tensor, device: torch.device) -> None:
    """Set torch's global generators to a state that `random_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # a copy, because PyTorch reads a view from its storage's start
    if device.type != "cpu" and len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)
