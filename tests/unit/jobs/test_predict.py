import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.errors import UserError
from app.jobs import predict
from app.jobs.predict import VIOLATION, Predictor
from tests.bundles import ROWS, build


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bundle") / "b", seed=1)


def test_rows_are_answered_as_the_endpoint_answers(path):
    bundle = Bundle(path)
    answered = Predictor(path, k=10)(pa.Table.from_pylist([{**row, "id": n} for n, row in enumerate(ROWS)]))
    expected = bundle.predict(columns_of(bundle.schema, ROWS))
    np.testing.assert_array_equal(answered["probability"].to_numpy(), expected)
    assert answered["id"].to_pylist() == list(range(len(ROWS)))
    assert answered[VIOLATION].null_count == len(ROWS)


def test_text_of_a_csv_is_read_as_the_contract_says(path):
    rows = [{name: None if value is None else str(value) for name, value in row.items()} for row in ROWS]
    answered = Predictor(path, k=10)(pa.Table.from_pylist(rows))
    expected = Predictor(path, k=10)(pa.Table.from_pylist(ROWS))
    assert answered["probability"] == expected["probability"]
    assert answered["age"].to_pylist() == [row["age"] for row in ROWS]
    assert Predictor(path, k=10, suffix="_2")(answered)["probability_2"] == answered["probability"]


def test_booleans_stand_for_numbers_as_in_training(path):
    rows = [{**ROWS[0], "age": age} for age in (1, 0)]
    as_booleans = pa.Table.from_pylist([{**row, "age": bool(row["age"])} for row in rows])
    predictor = Predictor(path, k=10)
    assert predictor(as_booleans)["probability"] == predictor(pa.Table.from_pylist(rows))["probability"]


def test_a_data_frame_is_answered_or_refused_with_its_rows(path):
    frame = pd.DataFrame(ROWS, index=["x", "y", "z"])
    answers = predict.predict(Bundle(path), frame)
    assert answers.index.tolist() == ["x", "y", "z"]
    with pytest.raises(UserError) as caught:
        predict.predict(Bundle(path), frame.assign(age=[39, None, 200]))
    assert str(caught.value) == (
        "2 of 3 rows break the contract of income; mend them or leave them out:\n"
        "  row 'y': age: must not be missing\n"
        "  row 'z': age: must be at most 120, not 200.0"
    )


def test_a_row_that_breaks_the_contract_is_told_why_and_the_others_are_answered(path):
    broken = [{**ROWS[0], "age": "old"}, {**ROWS[0], "age": "999"}, {**ROWS[0], "education": None}]
    table = pa.Table.from_pylist([{**row, "age": str(row["age"])} for row in [*broken, ROWS[0]]])
    answered = Predictor(path, k=10)(table).to_pylist()
    age, beyond, education, fine = answered
    assert "age" in age[VIOLATION]
    assert "old" in age[VIOLATION]
    assert "120" in beyond[VIOLATION]
    assert "education" in education[VIOLATION]
    assert [row["probability"] for row in (age, beyond, education)] == [None] * 3
    assert fine[VIOLATION] is None
    assert 0 < fine["probability"] < 1


def test_blocks_without_any_answer_and_without_any_row_have_the_same_columns(path):
    table = pa.Table.from_pylist([{**ROWS[0], "age": -1.0}])
    predictor = Predictor(path, k=10)
    none, empty = predictor(table), predictor(table.slice(0, 0))
    assert none.schema == empty.schema == predictor(pa.Table.from_pylist(ROWS, table.schema)).schema
    assert none["probability"].to_pylist() == [None]


def test_csv_is_told_from_parquet_by_the_name(tmp_path):
    assert predict.source("rows.csv").format == "csv"
    assert predict.source("s3://bucket/rows").format == "parquet"
    (tmp_path / "part.csv").write_text("a\n1\n")
    assert predict.source(str(tmp_path)).format == "csv"
