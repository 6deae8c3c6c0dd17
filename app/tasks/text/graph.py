"""The ONNX graph of a text classifier, from tokens to probabilities."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from app.bundle.bundle import OUTPUT, open_graph
from app.data import tokens
from app.tasks.onnx import export_graph, require_close, write

TEXTS_PER_BATCH = 64
"""Number of texts in a run of the graph and a forward pass, which are compared."""


def export(network: nn.Module, path: Path) -> None:
    """Write the graph, from `ids` and `mask`, int64 (rows, length), to probabilities (rows, classes)."""
    rows, length = torch.export.Dim("rows", min=1), torch.export.Dim("length", min=2)
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    # The encoder skips a mask of ones, so the graph of such an example would ignore all masks.
    mask[0, -1] = 0
    shapes = {name: {0: rows, 1: length} for name in ("ids", "mask")}
    write(export_graph(network.cpu().eval(), (ids, mask), ["ids", "mask"], [OUTPUT], shapes), path)


def difference(network: nn.Module, path: Path, ids: np.ndarray, lengths: np.ndarray) -> float:
    """The largest difference, over texts, between the graph's probabilities and PyTorch's.

    `ids` (rows, longest) and `lengths` (rows,) as `tokens.encode` returns them. Raises RuntimeError if it
    exceeds MAX_DIFFERENCE.
    """
    graph, network, largest = open_graph(path), network.cpu().eval(), 0.0
    for start in range(0, len(lengths), TEXTS_PER_BATCH):
        rows = slice(start, start + TEXTS_PER_BATCH)
        batch, mask = tokens.pad(ids[rows], lengths[rows])
        with torch.no_grad():
            expected = network(torch.from_numpy(batch), torch.from_numpy(mask)).numpy()
        probabilities = graph.run([OUTPUT], {"ids": batch, "mask": mask})[0]
        largest = max(largest, float(np.abs(probabilities - expected).max()))
    return require_close(largest)
