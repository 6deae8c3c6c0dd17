"""One reader of cells: its forms for one value, for many and for a column of a table say the same."""

import json
import math
from decimal import Decimal

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from app.bundle.schema import Input, Schema
from app.config import Category, Number, Text, projectfile
from app.data import contract
from app.data.cells import LIMIT, NUMBER, SPACE, Broken, Cells
from app.data.sources import samples
from app.serving.http import Refused
from app.serving.protocols import grpc_tensors, tensors
from app.serving.protocols import rows as json_rows
from app.serving.protocols.contract import Contract

MISSING = ["?", "-9", "n/a"]
CONTRACTS = [
    Number(type="number"),
    Number(type="number", nullable=True, min=-10, max=1000.5),
    Category(type="category", nullable=True),
    Category(type="category", values=["a", "b", "NA", "?"]),
    Text(type="text", nullable=True, max_characters=4),
]
READERS = [Cells(c, MISSING, getattr(c, "values", None)) for c in CONTRACTS]
AWKWARD = [
    "", "?", " ? ", "NA", "NaN", "nan", "-9", "-9.0", "18_0", "0x1F", "1,5", "+5", " 7 ", ".5", "5.", "1e400",
    "-1e400", "1.797e308", "inf", "-Infinity", "٣", "1e", "a", "b", "007", "9" * 400, "true", "n/a", "é",
    "a\0", "\N{NO-BREAK SPACE}1",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(AWKWARD), st.floats().map(str), st.integers().map(str), st.text(max_size=6))
NUMBERS = st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none())


def read(cells: Cells, value):
    """The value, or the broken rule."""
    try:
        value = cells.read(value)
    except Broken as rule:
        return str(rule), None
    return None, value


def read_text(cells: Cells, text: str | None):
    """A cell of a file without types: a number is one that is spelt, whatever else is as a typed string."""
    if cells.contract.type == "number" and text is not None:
        stripped = text.strip(SPACE)
        marker = stripped in ("", "NA", "NaN", "nan", *MISSING)
        if not marker and NUMBER.fullmatch(stripped):
            return read(cells, float(stripped))
    return read(cells, text)


def rows_of(values: np.ndarray, faults, num_rows: int):
    rules = [None] * num_rows
    for rule, mask in faults:
        for row in np.flatnonzero(mask):
            assert rules[row] is None, "a row breaks one rule"
            rules[row] = rule
    return [
        (rule, None if value is None or value != value else value)
        for rule, value in zip(rules, values.tolist(), strict=True)
    ]


@pytest.mark.parametrize("cells", READERS, ids=lambda cells: str(cells.contract))
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.none() | TEXTS, min_size=1, max_size=40))
def test_a_column_of_text_is_read_as_its_cells(cells, texts):
    expected = [read_text(cells, text) for text in texts]
    for kind in (pa.string(), pa.large_string()):
        column = pa.chunked_array([pa.array(texts[:3], kind), pa.array(texts[3:], kind)])
        assert rows_of(*cells.read_column(column, text=True), len(texts)) == expected
    column = pa.array(texts, pa.string()).dictionary_encode()
    assert rows_of(*cells.read_column(column, text=True), len(texts)) == expected


@pytest.mark.parametrize("cells", READERS, ids=lambda cells: str(cells.contract))
@settings(max_examples=25, deadline=None)
@given(values=st.lists(NUMBERS | TEXTS, min_size=1, max_size=40))
def test_many_values_are_read_as_each(cells, values):
    expected = [read(cells, value) for value in values]
    found, broken = cells.read_all(values)
    masks = [(rule, np.arange(len(values)) == row) for row, rule in broken.items()]
    assert rows_of(found, masks, len(values)) == expected
    assert rows_of(*cells.read_series(pd.Series(values, dtype=object)), len(values)) == expected


@pytest.mark.parametrize("cells", READERS[:2], ids=lambda cells: str(cells.contract))
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats() | st.none(), min_size=1, max_size=40))
def test_a_column_of_numbers_is_read_as_its_cells(cells, values):
    expected = [read(cells, value) for value in values]
    assert rows_of(*cells.read_column(pa.array(values, pa.float64()), text=True), len(values)) == expected
    assert rows_of(*cells.read_series(pd.Series(values, dtype="Float64")), len(values)) == expected


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, None, False]),
        pa.array([2**53 + 1, None, -9], pa.int64()),
        pa.array([2**64 - 1, None, 0], pa.uint64()),
        pa.array([1.5, None, -9.0], pa.float32()),
        pa.array([Decimal("1.25"), None, Decimal(-9)]),
        pa.nulls(3),
    ],
    ids=lambda values: str(values.type),
)
def test_a_number_of_any_type_is_read_as_its_cells(values):
    cells = Cells(Number(type="number", nullable=True), MISSING)
    expected = [read(cells, value) for value in values.to_pylist()]
    assert rows_of(*cells.read_column(values, text=True), 3) == expected
    assert rows_of(*cells.read_series(values.to_pandas()), 3) == expected


def test_what_is_missing_and_what_is_no_number():
    cells = Cells(Number(type="number", nullable=True), ["-9"])
    absent = [
        None,
        math.nan,
        pd.NA,
        pd.NaT,
        "",
        " ",
        "NA",
        "NaN",
        -9,
        -9.0,
        "-9",
        np.float32("nan"),
        Decimal("nan"),
    ]
    assert [cells.read(value) for value in absent] == [None] * len(absent)
    for value in ("39", "n/a", "null", [1], {}, b"1", 1j, pd.Timestamp(0), Decimal("sNaN")):
        assert read(cells, value) == ("must be a number", None)
    for value in (10**400, 2 * LIMIT, -1.797e308):
        assert read(cells, value) == ("must be between -1e+100 and 1e+100", None)
    assert read(cells, math.inf) == ("must be finite", None)
    assert [cells.read(v) for v in (True, False, np.True_, np.int8(3), Decimal("1.5"))] == [1, 0, 1, 3, 1.5]


def test_in_text_na_is_a_value():
    cells = Cells(Category(type="category"), ["?"])
    assert [cells.read(value) for value in ("NA", "nan", "null", "N/A", " ")] == [
        "NA",
        "nan",
        "null",
        "N/A",
        " ",
    ]
    assert read(cells, "\ud800") == ("must be valid Unicode", None)
    assert read(cells, 7) == ("must be a string", None)


# Training, tables, JSON, tensors and gRPC on every row of a training file


@pytest.fixture(scope="module")
def project():
    return projectfile.load("configs/income.yaml")


@pytest.fixture(scope="module")
def census(project) -> pa.Table:
    """The census with its question marks: 48,842 rows of which 3,620 have at least one."""
    return pa.parquet.read_table(samples.path("adult")).select(project.data.names)


@pytest.fixture(scope="module")
def trained(project, census) -> pd.DataFrame:
    """What training reads."""
    frame, broken = contract.conform(census, project.data)
    assert broken == []
    return frame[list(project.features)]


@pytest.fixture(scope="module")
def model(project, trained) -> Schema:
    inputs = [
        Input(
            name=name,
            contract=project.data.columns[name],
            known=None if trained[name].dtype == float else sorted(trained[name].dropna().unique()),
        )
        for name in project.features
    ]
    return Schema(name="income", inputs=inputs, missing=project.data.missing, label="income")


def assert_same(columns, trained: pd.DataFrame) -> None:
    for name in trained:
        expected = trained[name].to_numpy()
        np.testing.assert_array_equal(columns[name], expected, err_msg=name)


def test_the_census_has_markers(census, trained):
    assert sum(census[name].to_pylist().count("?") for name in ("workclass", "occupation")) > 4000
    assert trained["workclass"].isna().sum() > 2000


@pytest.mark.parametrize("num_rows", [1, 50_000], ids=["row by row", "at once"])
def test_rows_of_json_are_read_as_training_reads_them(census, trained, model, num_rows):
    contract = Contract(model, 50_000)
    rows = census.select([i.name for i in model.inputs]).to_pylist()
    if num_rows == 1:
        rows, trained = rows[:3000], trained.head(3000)
        read = [json_rows.parse(orjson.dumps({"rows": [row]}), contract).columns for row in rows]
        columns = {name: np.concatenate([each[name] for each in read]) for name in trained}
    else:
        columns = json_rows.parse(orjson.dumps({"rows": rows}), contract).columns
    assert_same(columns, trained)


def tensors_of(census: pa.Table, model: Schema) -> list[dict]:
    return [
        {
            "name": item.name,
            "shape": [census.num_rows, 1],
            "datatype": "INT64" if item.contract.type == "number" else "BYTES",
            "data": census[item.name].to_pylist(),
        }
        for item in model.inputs
    ]


def test_tensors_are_read_as_training_reads_them(census, trained, model):
    body = orjson.dumps({"inputs": tensors_of(census, model)})
    assert_same(tensors.parse(body, None, Contract(model, 50_000)).query.columns, trained)


@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_grpc_are_read_as_training_reads_them(census, trained, model, raw):
    inputs, contents = [], []
    for tensor in tensors_of(census, model):
        values = tensor.pop("data")
        if tensor["datatype"] == "INT64":
            typed = {"int64_contents": values}
            contents.append(np.array(values, "<i8").tobytes())
        else:
            typed = {"bytes_contents": [value.encode() for value in values]}
            contents.append(b"".join(len(v).to_bytes(4, "little") + v for v in typed["bytes_contents"]))
        if not raw:
            tensor["contents"] = messages.InferTensorContents(**typed)
        inputs.append(messages.ModelInferRequest.InferInputTensor(**tensor))
    request = messages.ModelInferRequest(
        model_name="income", inputs=inputs, raw_input_contents=contents if raw else None
    )
    head, tail = grpc_tensors.to_http(request)
    body = orjson.dumps(head)
    read = tensors.parse(body + tail, str(len(body)), Contract(model, 50_000)).query.columns
    assert_same(read, trained)


@pytest.mark.parametrize("text", [True, False], ids=["csv", "parquet"])
def test_tables_are_read_as_training_reads_them(census, trained, model, text):
    cells = model.cells()
    table = census.cast(pa.schema([(name, pa.string()) for name in census.column_names])) if text else census
    read = {name: cells[name].read_column(table[name], text=True) for name in trained}
    assert [name for name, (_, faults) in read.items() if faults] == []
    assert_same({name: values for name, (values, _) in read.items()}, trained)


@pytest.mark.parametrize("backend", ["numpy_nullable", "pyarrow", "object"])
def test_data_frames_are_read_as_training_reads_them(census, trained, model, backend):
    frame = census.to_pandas()
    frame = frame.astype(object) if backend == "object" else frame.convert_dtypes(dtype_backend=backend)
    cells = model.cells()
    assert_same({name: cells[name].read_series(frame[name])[0] for name in trained}, trained)


def test_a_request_is_read_the_same_whether_it_is_one_row_or_many():
    """What is checked together and what is checked row by row give the same refusals."""
    inputs = [
        Input(name="n", contract=CONTRACTS[1], known=None),
        Input(name="c", contract=Category(type="category", nullable=True, unseen="ignore"), known=["x"]),
    ]
    contract = Contract(Schema(name="m", inputs=inputs, missing=MISSING, label="y"), 100)
    good, bad = {"n": 5, "c": "x"}, {"n": "5", "c": "?", "more": 1}
    for count in (1, 99):
        with pytest.raises(Refused) as caught:
            json_rows.parse(json.dumps({"rows": [good] * (count - 1) + [bad]}).encode(), contract)
        assert [v["path"] for v in caught.value.violations] == [
            f"rows.{count - 1}.n",
            f"rows.{count - 1}.more",
        ]
