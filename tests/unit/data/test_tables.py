"""Each table is refused with one line, or read the same by training and by every kind of request."""

import numpy as np
import orjson
import pandas as pd
import pytest
from tritonclient.grpc import service_pb2 as messages

from app.bundle.schema import Input, Schema
from app.errors import UserError
from app.serving.protocols import grpc_tensors, tensors
from app.serving.protocols import rows as json_rows
from app.serving.protocols.contract import Contract
from tests import tables
from tests.tables import REFUSED, TRAINED

MAX_ROWS = 1000


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, tmp_path_factory):
    return tables.read(TRAINED[request.param], tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def names(trained) -> list[str]:
    return list(trained[0].columns)


@pytest.fixture(scope="module")
def contract(trained, names) -> Contract:
    """The contract of a model trained on all rows."""
    data, _, frame = trained
    inputs = [
        Input(
            name=name,
            contract=data.columns[name],
            known=sorted(frame[name].dropna().unique()) if data.columns[name].type == "category" else None,
        )
        for name in names
    ]
    return Contract(Schema(name="m", inputs=inputs, missing=data.missing, label="bought"), MAX_ROWS)


@pytest.fixture(scope="module")
def requested(trained) -> dict[str, list]:
    return tables.requested(*trained[:2])


def assert_same(columns, trained) -> None:
    for name, values in columns.items():
        np.testing.assert_array_equal(values, trained[2][name].to_numpy(), err_msg=name)


def test_a_table_is_read_completely(trained):
    """All tables have the same rows, except for the difference in their name."""
    data, _, frame = trained
    assert len(frame) in (120, 240)
    assert frame["bought"].nunique() == 2
    assert set(frame["bought"][:6]) == {"yes", "no"} or data.label.positive == "1"


def test_rows_of_json(trained, names, contract, requested):
    rows = [dict(zip(names, row, strict=True)) for row in zip(*requested.values(), strict=True)]
    assert_same(json_rows.parse(orjson.dumps({"rows": rows}), contract).columns, trained)


def test_tensors(trained, names, contract, requested):
    inputs = [
        {
            "name": name,
            "shape": [len(requested[name]), 1],
            "datatype": "FP64" if trained[0].columns[name].type == "number" else "BYTES",
            "data": requested[name],
        }
        for name in names
    ]
    assert_same(tensors.parse(orjson.dumps({"inputs": inputs}), None, contract).query.columns, trained)


def test_tensors_of_grpc(trained, names, contract, requested):
    """Typed tensors have no null and no text for a number: NaN and the empty string are sent."""
    inputs = []
    for name in names:
        if trained[0].columns[name].type == "number":
            kind, values = "FP64", [v if isinstance(v, float | bool) else np.nan for v in requested[name]]
            contents = messages.InferTensorContents(fp64_contents=values)
        else:
            kind = "BYTES"
            contents = messages.InferTensorContents(
                bytes_contents=[(v or "").encode() for v in requested[name]]
            )
        shape = [len(requested[name])]
        tensor = messages.ModelInferRequest.InferInputTensor
        inputs.append(tensor(name=name, datatype=kind, shape=shape, contents=contents))
    head, tail = grpc_tensors.to_http(messages.ModelInferRequest(model_name="m", inputs=inputs))
    body = orjson.dumps(head)
    assert_same(tensors.parse(body + tail, str(len(body)), contract).query.columns, trained)


def test_tables_and_data_frames(trained, contract, requested):
    _, rows, _ = trained
    for name, cells in contract.schema.cells().items():
        values, faults = cells.read_column(rows[name], parse_text=True)
        assert faults == []
        assert_same({name: values}, trained)
        values, faults = cells.read_series(pd.Series(requested[name], dtype=object))
        assert faults == []
        assert_same({name: values}, trained)


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_cannot_be_trained_on_is_refused_with_one_line(name, tmp_path):
    with pytest.raises(UserError) as caught:
        tables.read(REFUSED[name], tmp_path)
    (line,) = str(caught.value).splitlines()
    assert REFUSED[name].refusal in line


def test_there_are_many_tables():
    assert len(TRAINED) + len(REFUSED) >= 40
