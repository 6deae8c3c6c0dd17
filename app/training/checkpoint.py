"""A checkpoint: everything that the training loop needs to go on, in safetensors and JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Write the model, the optimizer and `state` (JSON values) into an empty folder."""
    save_file(_plain(model.state_dict()), folder / "model.safetensors")
    whole = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value for index, values in whole["state"].items() for name, value in values.items()
    }
    save_file(_plain(tensors), folder / "optimizer.safetensors")
    document = {**state, "param_groups": whole["param_groups"]}
    (folder / "state.json").write_text(json.dumps(document))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read what `save` wrote back into the model and the optimizer; returns the state."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    document = json.loads((folder / "state.json").read_text())
    values: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": document.pop("param_groups")})
    return document


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
