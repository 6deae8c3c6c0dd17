import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch

from app.bundle.bundle import OUTPUT, feed_of, open_graph
from app.config.families.tabular import LinearNumbers, PeriodicNumbers
from app.data.features import MISSING, BinnedNumber, Categories, FrequentNumbers, Preprocessor, ScaledNumber
from app.tasks.onnx import MAX_DIFFERENCE
from app.tasks.tabular.graph import difference, export
from app.tasks.tabular.network import LogisticRegression, MultiLayerPerceptron, TabularEnsemble

VALUES = [MISSING, "a b", "c", "größe ✓"]


def number(column: str, minimum: float = -2.0, maximum: float = 3.0, fill: float = 0.25) -> ScaledNumber:
    return ScaledNumber(column=column, minimum=minimum, maximum=maximum, fill=fill)


def binned(column: str, encode: str = "piecewise_linear") -> BinnedNumber:
    scores = [-1.5, -0.25, 0.0, 3.0] if encode == "quantile" else []
    return BinnedNumber(column=column, encode=encode, edges=[-2.0, 0.5, 0.75, 3.0], scores=scores, fill=0.6)


def exact(column: str, values: tuple[float, ...] = (-2.0, 0.1, 3.0)) -> FrequentNumbers:
    return FrequentNumbers(column=column, values=values)


def one_hot(column: str, values: list[str] = VALUES) -> Categories:
    return Categories(column=column, encode="one_hot", values=values, width=len(values))


def embedding(column: str, values: list[str] = VALUES) -> Categories:
    return Categories(column=column, encode="embedding", values=values, width=3)


LAYOUTS = {
    "numbers": [number("x"), number("y", 0, 1e9), number("constant", 5, 5, 0)],
    "one-hots": [one_hot("c"), one_hot("d", ["only"])],
    "embeddings": [embedding("c"), embedding("d", ["only"])],
    "mixed": [
        number("x"),
        number("y", 1e9, 1e9 + 3),
        one_hot("c"),
        embedding("d"),
        embedding("e", ["", "z"]),
    ],
    "bins": [number("x"), binned("y"), binned("z", "quantile"), exact("x"), exact("z"), exact("y", ())],
    "bins alone": [binned("y", "quantile")],
    "awkward names": [
        *(number(name) for name in ("/low", "low", "matrix", "a.b", "//matrix", "größe\n✓")),
        binned("/low/raw"),
        binned("numbers/raw"),
        exact("low"),
        *(one_hot(name) for name in ("encoded", "/encoded", "a/index")),
        embedding("network/linear"),
    ],
}


NETWORKS = {
    "linear": LogisticRegression,
    "mlp": lambda layout: MultiLayerPerceptron(layout, [16], 0.5, LinearNumbers(embed="linear")),
    "periodic": lambda layout: MultiLayerPerceptron(layout, [16], 0.5, PeriodicNumbers(embed="periodic")),
    "tabm": lambda layout: TabularEnsemble(layout, [16, 8], 0.5, 4, LinearNumbers(embed="linear")),
}


def network(preprocessor: Preprocessor, seed: int = 0, kind: str = "mlp") -> torch.nn.Module:
    """A network whose answers vary: random parameters of a size that trained ones have."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layout = preprocessor.layout
        model = NETWORKS[kind](layout)
        for table in model.columns.embeddings:
            torch.nn.init.normal_(table.weight[1:].detach())
        return model


def rows(preprocessor: Preprocessor, count: int, seed: int = 0) -> pd.DataFrame:
    """Random rows: inside and beyond the range, huge, missing, known and unseen."""
    random = np.random.default_rng(seed)
    columns = {}
    for c in preprocessor.columns:
        if isinstance(c, BinnedNumber):
            values = random.uniform(-5, 6, count)
            special = random.choice([np.nan, 1e300, -1e300, 0.1, *c.edges], count)
            columns[c.column] = np.where(random.random(count) < 0.5, special, values)
        elif isinstance(c, FrequentNumbers):
            continue
        elif isinstance(c, ScaledNumber):
            span = c.maximum - c.minimum or 1.0
            values = c.minimum + span * random.uniform(-1, 2, count)
            special = random.choice([np.nan, 1e300, -1e300, c.minimum, c.maximum], count)
            columns[c.column] = np.where(random.random(count) < 0.3, special, values)
        else:
            known = [None if v == MISSING else v for v in c.values]
            columns[c.column] = random.choice(np.array([*known, "unseen", None], dtype=object), count)
    return pd.DataFrame(columns)


def expected(model: torch.nn.Module, preprocessor: Preprocessor, frame: pd.DataFrame) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(preprocessor.transform(frame))).numpy()


def run(graph: onnxruntime.InferenceSession, frame: pd.DataFrame) -> np.ndarray:
    return graph.run([OUTPUT], feed_of({name: frame[name].to_numpy() for name in frame}))[0]


def export_network(folder, columns, seed: int = 0, kind: str = "mlp"):
    """The network, its preprocessor and the path of its graph."""
    preprocessor = Preprocessor(columns=columns)
    model = network(preprocessor, seed, kind)
    export(model, preprocessor, folder / "model.onnx")
    return model, preprocessor, folder / "model.onnx"


@pytest.fixture(
    scope="module",
    params=[
        ("numbers", "mlp"),
        ("numbers", "periodic"),
        ("one-hots", "linear"),
        ("embeddings", "tabm"),
        ("mixed", "mlp"),
        ("bins", "tabm"),
        ("bins alone", "linear"),
        ("awkward names", "linear"),
    ],
    ids="-".join,
)
def exported(request, tmp_path_factory):
    """A network on each layout. Exporting takes a second."""
    layout, kind = request.param
    return export_network(tmp_path_factory.mktemp(layout), LAYOUTS[layout], kind=kind)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return export_network(
        tmp_path_factory.mktemp("other"), [*LAYOUTS["mixed"][:1], one_hot("c"), embedding("d")]
    )


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_graph_answers_like_the_network(exported, count):
    model, preprocessor, path = exported
    frame = rows(preprocessor, count, seed=count)
    probabilities = run(open_graph(path), frame)
    assert probabilities.shape == (count, 1)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(
        probabilities[:, 0], expected(model, preprocessor, frame), atol=MAX_DIFFERENCE / 10
    )
    assert count < 1000 or probabilities.std() > 0.001, "equal answers would prove nothing"
    assert difference(model, preprocessor, path, frame) <= MAX_DIFFERENCE / 10


@pytest.mark.parametrize(
    "names",
    [
        {"number": "linear", "one_hot": "matrix", "embedding": "hours per-week/%"},
        {"number": "encoded"},
        {"number": "x", "embedding": "number"},
    ],
    ids=lambda names: ", ".join(names.values()),
)
def test_a_column_may_have_an_inner_name_of_the_graph(tmp_path, names):
    kinds = {"number": number, "one_hot": one_hot, "embedding": embedding}
    model, preprocessor, path = export_network(tmp_path, [kinds[kind](name) for kind, name in names.items()])
    difference(model, preprocessor, path, rows(preprocessor, 50))


def test_the_graph_has_an_input_for_each_raw_column(mixed):
    _, _, path = mixed
    graph = open_graph(path)
    assert {i.name: (i.type, i.shape) for i in graph.get_inputs()} == {
        "x": ("tensor(double)", ["rows"]),
        "c": ("tensor(string)", ["rows"]),
        "d": ("tensor(string)", ["rows"]),
    }
    (output,) = graph.get_outputs()
    assert (output.name, output.type, output.shape[1]) == (OUTPUT, "tensor(float)", 1)


def test_values_beyond_ascii_are_distinguished(mixed):
    model, preprocessor, path = mixed
    frame = pd.DataFrame(
        {"x": 0.0, "c": ["größe ✓", "grösse ✓", "größe", None], "d": ["c", "c", "c", "größe ✓"]}
    )
    probabilities = run(open_graph(path), frame)[:, 0]
    np.testing.assert_allclose(probabilities, expected(model, preprocessor, frame), atol=1e-6)
    assert probabilities[1] == probabilities[2], "both values are unseen"
    assert len(set(probabilities)) == 3


def test_the_graph_of_another_network_is_refused(mixed):
    _, preprocessor, path = mixed
    with pytest.raises(RuntimeError, match="differs from the trained model"):
        difference(network(preprocessor, seed=1), preprocessor, path, rows(preprocessor, 100))


def test_the_graph_of_another_preprocessor_is_refused(mixed):
    model, preprocessor, path = mixed
    shifted = Preprocessor(columns=[number("x", minimum=-1.0), *preprocessor.columns[1:]])
    with pytest.raises(RuntimeError, match="differs from the trained model"):
        difference(model, shifted, path, rows(preprocessor, 100))
