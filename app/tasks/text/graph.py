"""The ONNX graph of a text classifier: from tokens to probabilities."""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from app.bundle import OUTPUT, session
from app.data import tokens
from app.tasks.tabular.graph import MAX_DIFFERENCE, OPSET

TEXTS_AT_ONCE = 64


def export(network: nn.Module, path: Path) -> None:
    """Write the graph: `ids` and `mask`, int64 (rows, length) both, to probabilities (rows, classes)."""
    rows, length = torch.export.Dim("rows", min=1), torch.export.Dim("length", min=2)
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    mask[0, -1] = 0  # of a mask that hides nothing the encoder would make no use, in the graph ever after
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network.cpu().eval(),
            (ids, mask),
            dynamo=True,
            opset_version=OPSET,
            input_names=["ids", "mask"],
            output_names=[OUTPUT],
            dynamic_shapes={name: {0: rows, 1: length} for name in ("ids", "mask")},
            verbose=False,
        )
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    path.write_bytes(program.model_proto.SerializeToString())


def difference(network: nn.Module, path: Path, ids: np.ndarray, lengths: np.ndarray) -> float:
    """The largest difference between the graph's probabilities and PyTorch's, over texts.

    `ids` (rows, longest) and `lengths` (rows,) as of `tokens.encode`. Raises RuntimeError if it exceeds
    MAX_DIFFERENCE.
    """
    graph, network, worst = session(path), network.cpu().eval(), 0.0
    for start in range(0, len(lengths), TEXTS_AT_ONCE):
        rows = slice(start, start + TEXTS_AT_ONCE)
        feed = tokens.pad(ids[rows], lengths[rows])
        with torch.no_grad():
            expected = network(*(torch.from_numpy(feed[name]) for name in ("ids", "mask"))).numpy()
        worst = max(worst, float(np.abs(graph.run([OUTPUT], feed)[0] - expected).max()))
    if not worst <= MAX_DIFFERENCE:
        raise RuntimeError(
            f"the exported graph differs from the trained model by {worst:.2g} (limit {MAX_DIFFERENCE})"
        )
    return worst
