"""Training, tables, JSON, tensors and gRPC read every row of a training file in the same way."""

import json

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest
from tritonclient.grpc import service_pb2 as messages

from app.bundle.schema import Input, Schema
from app.config import Category, Number, projectfile
from app.data.contract import conform
from app.data.sources import samples
from app.serving.http import Refused
from app.serving.protocols import grpc_tensors, tensors
from app.serving.protocols import rows as json_rows
from app.serving.protocols.contract import Contract

MAX_ROWS = 50_000


@pytest.fixture(scope="module")
def project():
    return projectfile.load("configs/income.yaml")


@pytest.fixture(scope="module")
def census(project) -> pa.Table:
    """The census with its question marks: 48,842 rows, of which 3,620 have at least one."""
    return pa.parquet.read_table(samples.path("adult")).select(project.data.names)


@pytest.fixture(scope="module")
def trained(project, census) -> pd.DataFrame:
    """The columns as training reads them."""
    frame, violations = conform(census, project.data)
    assert violations == []
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
        np.testing.assert_array_equal(columns[name], trained[name].to_numpy(), err_msg=name)


def test_census_has_markers(census, trained):
    assert sum(census[name].to_pylist().count("?") for name in ("workclass", "occupation")) > 4000
    assert trained["workclass"].isna().sum() > 2000


@pytest.mark.parametrize("row_by_row", [True, False])
def test_json_rows_agree_with_training(census, trained, model, row_by_row):
    contract = Contract(model, MAX_ROWS)
    rows = census.select([i.name for i in model.inputs]).to_pylist()
    if row_by_row:
        rows, trained = rows[:3000], trained.head(3000)
        queries = [json_rows.parse(orjson.dumps({"rows": [row]}), contract).columns for row in rows]
        columns = {name: np.concatenate([query[name] for query in queries]) for name in trained}
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


def test_json_tensors_agree_with_training(census, trained, model):
    body = orjson.dumps({"inputs": tensors_of(census, model)})
    assert_same(tensors.parse(body, None, Contract(model, MAX_ROWS)).query.columns, trained)


@pytest.mark.parametrize("raw", [True, False])
def test_grpc_tensors_agree_with_training(census, trained, model, raw):
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
    query = tensors.parse(body + tail, str(len(body)), Contract(model, MAX_ROWS)).query
    assert_same(query.columns, trained)


@pytest.mark.parametrize("as_text", [True, False], ids=["csv", "parquet"])
def test_tables_agree_with_training(census, trained, model, as_text):
    cells = model.cells()
    strings = pa.schema([(name, pa.string()) for name in census.column_names])
    table = census.cast(strings) if as_text else census
    columns = {}
    for name in trained:
        columns[name], faults = cells[name].read_column(table[name], parse_text=True)
        assert faults == []
    assert_same(columns, trained)


@pytest.mark.parametrize("backend", ["numpy_nullable", "pyarrow", "object"])
def test_data_frames_agree_with_training(census, trained, model, backend):
    frame = census.to_pandas()
    frame = frame.astype(object) if backend == "object" else frame.convert_dtypes(dtype_backend=backend)
    cells = model.cells()
    assert_same({name: cells[name].read_series(frame[name])[0] for name in trained}, trained)


def test_a_batch_and_a_single_row_report_the_same_violations():
    number = Number(type="number", nullable=True, min=-10, max=1000.5)
    category = Category(type="category", nullable=True, unseen="ignore")
    inputs = [
        Input(name="n", contract=number, known=None),
        Input(name="c", contract=category, known=["x"]),
    ]
    contract = Contract(Schema(name="m", inputs=inputs, missing=["?"], label="y"), 100)
    valid, invalid = {"n": 5, "c": "x"}, {"n": "5", "c": "?", "more": 1}
    for count in (1, 99):
        with pytest.raises(Refused) as caught:
            json_rows.parse(json.dumps({"rows": [valid] * (count - 1) + [invalid]}).encode(), contract)
        assert [v["path"] for v in caught.value.violations] == [
            f"rows.{count - 1}.n",
            f"rows.{count - 1}.more",
        ]
