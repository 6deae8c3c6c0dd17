"""The ONNX graph of a text classifier: from tokens to probabilities."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from app.bundle.bundle import OUTPUT, open_graph
from app.data import tokens
from app.tasks.onnx import exported, require_equal, write

TEXTS_AT_ONCE = 64


def export(network: nn.Module, path: Path) -> None:
    """Write the graph: `ids` and `mask`, int64 (rows, length) both, to probabilities (rows, classes)."""
    rows, length = torch.export.Dim("rows", min=1), torch.export.Dim("length", min=2)
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    mask[0, -1] = 0  # of a mask that hides nothing the encoder would make no use, in the graph ever after
    shapes = {name: {0: rows, 1: length} for name in ("ids", "mask")}
    write(exported(network.cpu().eval(), (ids, mask), ["ids", "mask"], [OUTPUT], shapes), path)


def difference(network: nn.Module, path: Path, ids: np.ndarray, lengths: np.ndarray) -> float:
    """The largest difference between the graph's probabilities and PyTorch's, over texts.

    `ids` (rows, longest) and `lengths` (rows,) as of `tokens.encode`. Raises RuntimeError if it exceeds
    MAX_DIFFERENCE.
    """
    graph, network, worst = open_graph(path), network.cpu().eval(), 0.0
    for start in range(0, len(lengths), TEXTS_AT_ONCE):
        rows = slice(start, start + TEXTS_AT_ONCE)
        cut, mask = tokens.pad(ids[rows], lengths[rows])
        with torch.no_grad():
            expected = network(torch.from_numpy(cut), torch.from_numpy(mask)).numpy()
        given = graph.run([OUTPUT], {"ids": cut, "mask": mask})[0]
        worst = max(worst, float(np.abs(given - expected).max()))
    return require_equal(worst)
