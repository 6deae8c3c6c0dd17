"""Exports a network as an ONNX graph, and limits the difference between the two."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

MAX_DIFFERENCE = 1e-4
"""Maximum difference between an output of the graph and that of PyTorch."""
OPSET = 20
"""Version of ONNX's operators."""


def export_graph(
    network: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: dict[str, Any],
) -> onnx.ModelProto:
    """Export a network. `inputs` and `outputs` are the names of its tensors. `dynamic_shapes` has the axes
    whose length may differ from the example's, as `torch.export` takes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
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
    """Check a graph and write it. Raises `onnx.checker.ValidationError` if it is not valid."""
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def require_close(difference: float) -> float:
    """Return `difference`, between a graph and PyTorch. Raises RuntimeError if it exceeds MAX_DIFFERENCE or
    is NaN."""
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(
            f"the exported graph differs from the trained model by {difference:.2g}; limit: {MAX_DIFFERENCE}"
        )
    return difference


def inner_prefix(columns: Iterable[str]) -> str:
    """A prefix for a graph's inner names, with which no column begins: one slash more than any column has."""
    return "/" * (1 + max(len(name) - len(name.lstrip("/")) for name in columns))
