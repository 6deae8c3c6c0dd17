"""Exporting a network as an ONNX graph, and holding the two against each other."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

MAX_DIFFERENCE = 1e-4
"""Largest difference allowed between the graph's outputs and PyTorch's, on any row."""
OPSET = 20


def exported(
    network: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: dict[str, Any],
) -> onnx.ModelProto:
    """The graph of a network; `inputs` and `outputs` are the names that its tensors get.

    `dynamic_shapes` are the axes that may have another length than in the `example`, as `torch.export` takes
    them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def write(graph: onnx.ModelProto, path: Path) -> None:
    """Check a graph and write it."""
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def require_equal(difference: float) -> float:
    """Raises RuntimeError if a difference to PyTorch exceeds MAX_DIFFERENCE or is NaN; returns it."""
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(
            f"the exported graph differs from the trained model by {difference:.2g} (limit {MAX_DIFFERENCE})"
        )
    return difference


def inner_prefix(columns: Iterable[str]) -> str:
    """What inner names of a graph begin with and no column does: as many slashes as that takes."""
    return "/" * (1 + max(len(name) - len(name.lstrip("/")) for name in columns))
