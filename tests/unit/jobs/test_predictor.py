import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.errors import UserError
from app.jobs.predictor import VIOLATION, Predictor, predict, prediction_columns
from tests.bundles import ROWS, build


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bundle") / "b", seed=1)


def test_rows_have_the_predictions_of_the_bundle(path):
    bundle = Bundle(path)
    predicted = Predictor(path, k=10)(pa.Table.from_pylist([{**row, "id": n} for n, row in enumerate(ROWS)]))
    expected = bundle.predict(columns_of(bundle.schema, ROWS))
    np.testing.assert_array_equal(predicted["probability"].to_numpy(), expected)
    assert predicted["id"].to_pylist() == list(range(len(ROWS)))
    assert predicted[VIOLATION].null_count == len(ROWS)


def test_text_of_a_csv_file_is_read_by_the_contract(path):
    rows = [{name: None if value is None else str(value) for name, value in row.items()} for row in ROWS]
    predicted = Predictor(path, k=10)(pa.Table.from_pylist(rows))
    expected = Predictor(path, k=10)(pa.Table.from_pylist(ROWS))
    assert predicted["probability"] == expected["probability"]
    assert predicted["age"].to_pylist() == [row["age"] for row in ROWS]
    assert Predictor(path, k=10, suffix="_2")(predicted)["probability_2"] == predicted["probability"]


def test_booleans_are_read_as_numbers(path):
    rows = [{**ROWS[0], "age": age} for age in (1, 0)]
    as_booleans = pa.Table.from_pylist([{**row, "age": bool(row["age"])} for row in rows])
    predictor = Predictor(path, k=10)
    assert predictor(as_booleans)["probability"] == predictor(pa.Table.from_pylist(rows))["probability"]


def test_a_data_frame_is_predicted_or_refused_with_its_rows(path):
    frame = pd.DataFrame(ROWS, index=["x", "y", "z"])
    answers = predict(Bundle(path), frame)
    assert answers.index.tolist() == ["x", "y", "z"]
    with pytest.raises(UserError) as caught:
        predict(Bundle(path), frame.assign(age=[39, None, 200]))
    assert str(caught.value) == (
        "2 of 3 rows break the contract of income; correct them or leave them out:\n"
        "  row 'y': age: must not be missing\n"
        "  row 'z': age: must be at most 120, not 200.0"
    )


def test_a_row_that_breaks_the_contract_has_the_reason_and_other_rows_are_predicted(path):
    invalid = [{**ROWS[0], "age": "old"}, {**ROWS[0], "age": "999"}, {**ROWS[0], "education": None}]
    table = pa.Table.from_pylist([{**row, "age": str(row["age"])} for row in [*invalid, ROWS[0]]])
    age, beyond, education, valid = Predictor(path, k=10)(table).to_pylist()
    assert "age" in age[VIOLATION]
    assert "old" in age[VIOLATION]
    assert "120" in beyond[VIOLATION]
    assert "education" in education[VIOLATION]
    assert [row["probability"] for row in (age, beyond, education)] == [None] * 3
    assert valid[VIOLATION] is None
    assert 0 < valid["probability"] < 1


def test_blocks_without_predictions_or_rows_have_the_same_columns(path):
    table = pa.Table.from_pylist([{**ROWS[0], "age": -1.0}])
    predictor = Predictor(path, k=10)
    unpredicted, empty = predictor(table), predictor(table.slice(0, 0))
    assert unpredicted.schema == empty.schema == predictor(pa.Table.from_pylist(ROWS, table.schema)).schema
    assert unpredicted["probability"].to_pylist() == [None]


def test_prediction_columns_are_those_that_are_appended(path):
    table = Predictor(path, k=10, suffix="_2")(pa.Table.from_pylist(ROWS))
    names = [f"{name}_2" for name in prediction_columns(Bundle(path).schema)]
    assert table.column_names[-len(names) :] == names
