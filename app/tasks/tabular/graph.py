"""The ONNX graph of a tabular model, from raw columns to probabilities: fitted preprocessing and network."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import pandas as pd
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.bundle.bundle import OUTPUT, feed_of, open_graph
from app.data.features import BinnedNumber, Categories, FrequentNumbers, Preprocessor, ScaledNumber
from app.tasks.onnx import OPSET, export_graph, inner_prefix, require_close, write


class _Column(nn.Module):
    """A network whose probabilities are a column, (rows, 1)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, None]


def export(network: nn.Module, preprocessor: Preprocessor, path: Path) -> None:
    """Write the graph: an input (rows,) for each raw column, float64 or string, and the output, float32
    (rows, 1)."""
    example = torch.zeros(2, preprocessor.layout.width)
    rows = torch.export.Dim("rows", min=1)
    graph = export_graph(_Column(network.cpu().eval()), (example,), ["matrix"], [OUTPUT], {"x": {0: rows}})
    preprocessing = _preprocessing(preprocessor, graph.ir_version)
    # A column may have the same name as a value inside the exported network, such as "linear". The prefix
    # makes them differ; it has one slash more than the prefix of the preprocessing.
    prefix = inner_prefix(c.column for c in preprocessor.columns)
    graph = onnx.compose.add_prefix(graph, f"{prefix}/", rename_outputs=False)
    joint = [(f"{prefix}encoded", f"{prefix}/matrix")]
    write(onnx.compose.merge_models(preprocessing, graph, io_map=joint), path)


def difference(network: nn.Module, preprocessor: Preprocessor, path: Path, frame: pd.DataFrame) -> float:
    """The largest difference, over rows, between the graph's probabilities and those of PyTorch with the
    preprocessing of training. Raises RuntimeError if it exceeds MAX_DIFFERENCE."""
    with torch.no_grad():
        matrix = torch.from_numpy(preprocessor.transform(frame))
        expected = network.cpu().eval()(matrix).numpy()
    columns = {c.column: frame[c.column].to_numpy() for c in preprocessor.columns}
    probabilities = open_graph(path).run([OUTPUT], feed_of(columns))[0]
    return require_close(float(np.abs(probabilities[:, 0] - expected).max()))


def _preprocessing(preprocessor: Preprocessor, ir_version: int) -> onnx.ModelProto:
    """A graph with the arithmetic of `Preprocessor.transform` and the output `encoded`."""
    graph = _Graph(inner_prefix(c.column for c in preprocessor.columns))
    scaled = [c for c in preprocessor.columns if isinstance(c, ScaledNumber)]
    binned = [c for c in preprocessor.columns if isinstance(c, BinnedNumber)]
    exact = [c for c in preprocessor.columns if isinstance(c, FrequentNumbers)]
    categories = [c for c in preprocessor.columns if isinstance(c, Categories)]
    graph.constant("axis", np.array([1]))
    for number in [*scaled, *binned]:
        graph.add("Unsqueeze", [number.column, graph.full_name("axis")], f"{number.column}/raw")
    parts = [_scaled(graph, scaled)] if scaled else []
    parts += [_binned(graph, number) for number in binned]
    parts += [_exact(graph, number) for number in exact]
    parts += [_encoded(graph, column) for column in categories]
    graph.add("Concat", parts, "encoded", axis=1)

    inputs = [(c.column, TensorProto.DOUBLE) for c in [*scaled, *binned]]
    inputs += [(c.column, TensorProto.STRING) for c in categories]
    output = helper.make_tensor_value_info(
        graph.full_name("encoded"), TensorProto.FLOAT, ["rows", preprocessor.layout.width]
    )
    proto = helper.make_graph(
        graph.nodes,
        "preprocessing",
        [helper.make_tensor_value_info(name, kind, ["rows"]) for name, kind in inputs],
        [output],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 4)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=ir_version)


class _Graph:
    """The nodes and constants of a graph. Inner names begin with `prefix`, with which no column begins."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def full_name(self, name: str) -> str:
        """The full name of an inner value, such as `age/raw`."""
        return f"{self._prefix}{name}"

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant; returns its full name."""
        self.constants.append(numpy_helper.from_array(value, self.full_name(name)))
        return self.full_name(name)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node. `inputs` are full names, `output` is an inner name; returns the output's full name."""
        self.nodes.append(helper.make_node(operator, inputs, [self.full_name(output)], **attributes))
        return self.full_name(output)


def _scaled(graph: _Graph, numbers: list[ScaledNumber]) -> str:
    """Scale all numbers at once, in float64 as in training: in float32 large numbers would lose digits."""
    low = graph.constant("low", np.array([c.minimum for c in numbers]))
    span = graph.constant("span", np.array([c.maximum - c.minimum or np.inf for c in numbers]))
    fill = graph.constant("fill", np.array([c.fill for c in numbers]))
    zero, one = graph.constant("zero", np.array(0.0)), graph.constant("one", np.array(1.0))
    raw = graph.add("Concat", [graph.full_name(f"{c.column}/raw") for c in numbers], "numbers", axis=1)
    shifted = graph.add("Sub", [raw, low], "shifted")
    divided = graph.add("Div", [shifted, span], "divided")
    clipped = graph.add("Clip", [divided, zero, one], "clipped")
    absent = graph.add("IsNaN", [raw], "absent")
    filled = graph.add("Where", [absent, fill, clipped], "filled")
    return graph.add("Cast", [filled], "scaled", to=TensorProto.FLOAT)


def _binned(graph: _Graph, number: BinnedNumber) -> str:
    """Encode one number by its share of each bin, or by the weighted sum of the shares; in float64."""
    name = number.column
    raw = graph.full_name(f"{name}/raw")
    edges = graph.constant(f"{name}/edges", np.array(number.edges[:-1]))
    widths = graph.constant(f"{name}/widths", np.diff(number.edges))
    fill = graph.constant(f"{name}/fill", np.array(number.fill))
    zero = graph.constant(f"{name}/zero", np.array(0.0))
    one = graph.constant(f"{name}/one", np.array(1.0))
    absent = graph.add("IsNaN", [raw], f"{name}/absent")
    filled = graph.add("Where", [absent, fill, raw], f"{name}/filled")
    above = graph.add("Sub", [filled, edges], f"{name}/above")
    divided = graph.add("Div", [above, widths], f"{name}/divided")
    value = graph.add("Clip", [divided, zero, one], f"{name}/shares")
    if number.scores:
        steps = graph.constant(f"{name}/steps", np.diff(number.scores)[:, None])
        lowest = graph.constant(f"{name}/lowest", np.array(number.scores[0]))
        climbed = graph.add("MatMul", [value, steps], f"{name}/climbed")
        value = graph.add("Add", [climbed, lowest], f"{name}/score")
    return graph.add("Cast", [value], f"{name}/binned", to=TensorProto.FLOAT)


def _exact(graph: _Graph, number: FrequentNumbers) -> str:
    """Compare one number with its frequent values: an indicator for each."""
    name = number.column
    values = graph.constant(f"{name}/values", np.array(number.values, dtype=np.float64))
    same = graph.add("Equal", [graph.full_name(f"{name}/raw"), values], f"{name}/same")
    return graph.add("Cast", [same], f"{name}/exact", to=TensorProto.FLOAT)


def _encoded(graph: _Graph, column: Categories) -> str:
    """Encode one category: as its index among the known values, from 1, or 0 if unknown; or one-hot, as an
    indicator for each known value."""
    name = column.column
    index = graph.add(
        "LabelEncoder",
        [name],
        f"{name}/index",
        domain="ai.onnx.ml",
        keys_strings=column.values,
        values_int64s=list(range(1, len(column.values) + 1)),
        default_int64=0,
    )
    if column.encode == "one_hot":
        table = graph.constant(f"{name}/table", np.eye(len(column.values) + 1, dtype=np.float32)[:, 1:])
        return graph.add("Gather", [table, index], f"{name}/encoded", axis=0)
    number = graph.add("Cast", [index], f"{name}/number", to=TensorProto.FLOAT)
    return graph.add("Unsqueeze", [number, graph.full_name("axis")], f"{name}/encoded")
