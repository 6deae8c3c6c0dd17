"""One ONNX graph from raw columns to probabilities: the fitted preprocessing and the trained model."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import pandas as pd
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.bundle import OUTPUT, inputs, session
from app.data.features import Categories, Preprocessor, Scaled

MAX_DIFFERENCE = 1e-4
"""Between the graph's probabilities and PyTorch's, on any row."""
OPSET = 20


class _Probability(nn.Module):
    """The trained model with its logits turned into probabilities, (rows, 1)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.model(x))[:, None]


def export(model: nn.Module, preprocessor: Preprocessor, path: Path) -> None:
    """Write the graph: an input (rows, 1) for each raw column, float64 or string, one output (rows, 1)."""
    model = _Probability(model.cpu().eval())
    example = torch.zeros(2, preprocessor.layout.width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["matrix"],
            output_names=[OUTPUT],
            dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1)}},
            verbose=False,
        )
    assert program is not None
    network = program.model_proto
    front = _preprocessing(preprocessor, network.ir_version)
    # Names of inner values could meet by chance; inputs and outputs keep theirs.
    front = onnx.compose.add_prefix(front, "raw/", rename_inputs=False, rename_outputs=False)
    whole = onnx.compose.merge_models(front, network, io_map=[("encoded", "matrix")])
    onnx.checker.check_model(whole, full_check=True)
    path.write_bytes(whole.SerializeToString())


def difference(model: nn.Module, preprocessor: Preprocessor, path: Path, frame: pd.DataFrame) -> float:
    """The largest difference between the graph and PyTorch on training-time preprocessing, over rows.

    Raises RuntimeError if it exceeds MAX_DIFFERENCE.
    """
    with torch.no_grad():
        matrix = torch.from_numpy(preprocessor.transform(frame))
        expected = torch.sigmoid(model.cpu().eval()(matrix)).numpy()
    columns: Mapping[str, np.ndarray] = {c.column: frame[c.column].to_numpy() for c in preprocessor.columns}
    (got,) = session(path).run([OUTPUT], inputs(columns))
    worst = float(np.abs(got[:, 0] - expected).max())
    if not worst <= MAX_DIFFERENCE:
        raise RuntimeError(
            f"the exported graph differs from the trained model by {worst:.2g} (limit {MAX_DIFFERENCE})"
        )
    return worst


def _preprocessing(preprocessor: Preprocessor, ir_version: int) -> onnx.ModelProto:
    """The same arithmetic as `Preprocessor.transform`, as a graph with the output `encoded`."""
    graph_inputs, nodes, constants, parts = [], [], [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    numbers = [c for c in preprocessor.columns if isinstance(c, Scaled)]
    for column in preprocessor.columns:
        kind = TensorProto.DOUBLE if isinstance(column, Scaled) else TensorProto.STRING
        graph_inputs.append(helper.make_tensor_value_info(column.column, kind, ["rows", 1]))
    if numbers:
        # In float64 like training: a large number would lose its last digits before it is scaled.
        spans = [c.maximum - c.minimum or np.inf for c in numbers]
        low = constant("low", np.array([c.minimum for c in numbers]))
        span = constant("span", np.array(spans))
        fill = constant("fill", np.array([c.fill for c in numbers]))
        zero, one = constant("zero", np.array(0.0)), constant("one", np.array(1.0))
        nodes += [
            helper.make_node("Concat", [c.column for c in numbers], ["numbers"], axis=1),
            helper.make_node("Sub", ["numbers", low], ["shifted"]),
            helper.make_node("Div", ["shifted", span], ["divided"]),
            helper.make_node("Clip", ["divided", zero, one], ["clipped"]),
            helper.make_node("IsNaN", ["numbers"], ["absent"]),
            helper.make_node("Where", ["absent", fill, "clipped"], ["filled"]),
            helper.make_node("Cast", ["filled"], ["scaled"], to=TensorProto.FLOAT),
        ]
        parts.append("scaled")
    axis = constant("axis", np.array([1]))
    for column in preprocessor.columns:
        if not isinstance(column, Categories):
            continue
        name = column.column
        places = list(range(1, len(column.values) + 1))
        nodes.append(
            helper.make_node(
                "LabelEncoder",
                [name],
                [f"{name}/place"],
                domain="ai.onnx.ml",
                keys_strings=column.values,
                values_int64s=places,
                default_int64=0,
            )
        )
        if column.encode == "embedding":
            nodes.append(
                helper.make_node("Cast", [f"{name}/place"], [f"{name}/encoded"], to=TensorProto.FLOAT)
            )
        else:
            table = constant(f"{name}/table", np.eye(len(column.values) + 1, dtype=np.float32)[:, 1:])
            nodes += [
                helper.make_node("Gather", [table, f"{name}/place"], [f"{name}/rows"], axis=0),
                helper.make_node("Squeeze", [f"{name}/rows", axis], [f"{name}/encoded"]),
            ]
        parts.append(f"{name}/encoded")
    nodes.append(helper.make_node("Concat", parts, ["encoded"], axis=1))
    width = preprocessor.layout.width
    output = helper.make_tensor_value_info("encoded", TensorProto.FLOAT, ["rows", width])
    graph = helper.make_graph(nodes, "preprocessing", graph_inputs, [output], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 4)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
