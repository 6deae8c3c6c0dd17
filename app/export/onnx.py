"""One ONNX graph from raw columns to probabilities: the fitted preprocessing and the trained model."""

import logging
import warnings
from pathlib import Path
from typing import Any

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


class _Column(nn.Module):
    """A network with its probabilities as a column, (rows, 1)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, None]


def export(model: nn.Module, preprocessor: Preprocessor, path: Path) -> None:
    """Write the graph: an input (rows,) for each raw column, float64 or string; one output (rows, 1)."""
    model = _Column(model.cpu().eval())
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
    # The exporter's inner names ("linear", say) could be a column's.
    network = onnx.compose.add_prefix(network, "/network/", rename_inputs=False, rename_outputs=False)
    whole = onnx.compose.merge_models(front, network, io_map=[("/encoded", "matrix")])
    onnx.checker.check_model(whole, full_check=True)
    path.write_bytes(whole.SerializeToString())


def difference(model: nn.Module, preprocessor: Preprocessor, path: Path, frame: pd.DataFrame) -> float:
    """The largest difference between the graph and PyTorch on training-time preprocessing, over rows.

    Raises RuntimeError if it exceeds MAX_DIFFERENCE.
    """
    with torch.no_grad():
        matrix = torch.from_numpy(preprocessor.transform(frame))
        expected = model.cpu().eval()(matrix).numpy()
    columns = {c.column: frame[c.column].to_numpy() for c in preprocessor.columns}
    got = session(path).run([OUTPUT], inputs(columns))[0]
    worst = float(np.abs(got[:, 0] - expected).max())
    if not worst <= MAX_DIFFERENCE:
        raise RuntimeError(
            f"the exported graph differs from the trained model by {worst:.2g} (limit {MAX_DIFFERENCE})"
        )
    return worst


def _preprocessing(preprocessor: Preprocessor, ir_version: int) -> onnx.ModelProto:
    """The same arithmetic as `Preprocessor.transform`, as a graph with the output `encoded`."""
    graph = _Graph()
    numbers = [c for c in preprocessor.columns if isinstance(c, Scaled)]
    categories = [c for c in preprocessor.columns if isinstance(c, Categories)]
    parts = [_scaled(graph, numbers)] if numbers else []
    parts += [_encoded(graph, column) for column in categories]
    graph.add("Concat", parts, "/encoded", axis=1)

    takes = [(c.column, TensorProto.DOUBLE) for c in numbers]
    takes += [(c.column, TensorProto.STRING) for c in categories]
    gives = helper.make_tensor_value_info("/encoded", TensorProto.FLOAT, ["rows", preprocessor.layout.width])
    proto = helper.make_graph(
        graph.nodes,
        "preprocessing",
        [helper.make_tensor_value_info(name, kind, ["rows"]) for name, kind in takes],
        [gives],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 4)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=ir_version)


class _Graph:
    """Nodes and constants as they are added; inner names begin with a slash, to stay clear of columns'."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, f"/{name}"))
        return f"/{name}"

    def add(self, operator: str, takes: list[str], gives: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, takes, [gives], **attributes))
        return gives


def _scaled(graph: _Graph, numbers: list[Scaled]) -> str:
    """All numbers at once, in float64 like training: a large one would lose digits before it is scaled."""
    axis = graph.constant("axis", np.array([1]))
    low = graph.constant("low", np.array([c.minimum for c in numbers]))
    span = graph.constant("span", np.array([c.maximum - c.minimum or np.inf for c in numbers]))
    fill = graph.constant("fill", np.array([c.fill for c in numbers]))
    zero, one = graph.constant("zero", np.array(0.0)), graph.constant("one", np.array(1.0))
    columns = [graph.add("Unsqueeze", [c.column, axis], f"/{c.column}/column") for c in numbers]
    raw = graph.add("Concat", columns, "/numbers", axis=1)
    shifted = graph.add("Sub", [raw, low], "/shifted")
    divided = graph.add("Div", [shifted, span], "/divided")
    clipped = graph.add("Clip", [divided, zero, one], "/clipped")
    absent = graph.add("IsNaN", [raw], "/absent")
    filled = graph.add("Where", [absent, fill, clipped], "/filled")
    return graph.add("Cast", [filled], "/scaled", to=TensorProto.FLOAT)


def _encoded(graph: _Graph, column: Categories) -> str:
    """One category: its place among the known values, 0 if it is none, then a row of a table or itself."""
    name = column.column
    place = graph.add(
        "LabelEncoder",
        [name],
        f"/{name}/place",
        domain="ai.onnx.ml",
        keys_strings=column.values,
        values_int64s=list(range(1, len(column.values) + 1)),
        default_int64=0,
    )
    if column.encode == "one_hot":
        table = graph.constant(f"{name}/table", np.eye(len(column.values) + 1, dtype=np.float32)[:, 1:])
        return graph.add("Gather", [table, place], f"/{name}/encoded", axis=0)
    axis = graph.constant(f"{name}/axis", np.array([1]))
    number = graph.add("Cast", [place], f"/{name}/number", to=TensorProto.FLOAT)
    return graph.add("Unsqueeze", [number, axis], f"/{name}/encoded")
