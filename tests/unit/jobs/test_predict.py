import pytest

from app.bundle.schema import Input, Schema
from app.config import Number
from app.errors import UserError
from app.jobs import predict


def test_the_format_of_a_source_is_that_of_its_names(tmp_path):
    assert predict.source("rows.csv").format == "csv"
    assert predict.source("rows.PARQUET").format == "parquet"
    assert predict.source("s3://bucket/rows").format == "parquet"
    (tmp_path / "part.csv").write_text("a\n1\n")
    assert predict.source(str(tmp_path)).format == "csv"


def test_a_source_with_several_formats_or_none_is_refused(tmp_path):
    for name in ("part.csv", "part.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="has CSV and Parquet files; give a folder with one of them"):
        predict.source(str(tmp_path))
    with pytest.raises(UserError, match=r"must be a folder or a file whose name ends in \.parquet, \.csv"):
        predict.source("rows.xlsx")


@pytest.mark.parametrize(
    ("names", "suffix"),
    [
        (["age"], ""),
        (["age", "probability"], "_2"),
        (["age", "violation"], "_2"),
        (["probability", "violation_2"], "_3"),
    ],
)
def test_the_suffix_makes_prediction_columns_unique(names, suffix):
    inputs = [Input(name="age", contract=Number(type="number"), known=None)]
    schema = Schema(name="m", inputs=inputs, missing=[], label="y")
    assert predict._free_suffix(schema, names) == suffix


@pytest.mark.parametrize(
    ("num_free_cpus", "num_actors", "cpus"), [(4.5, 4, None), (2.0, 2, None), (1.5, 1, 0.5), (1.0, 1, 0.0)]
)
def test_actors_leave_a_cpu_for_reading(num_free_cpus, num_actors, cpus):
    options = predict._actor_options(num_free_cpus)
    assert options["compute"].max_size == num_actors
    assert options.get("num_cpus") == cpus


def test_a_folder_is_a_bundle(tmp_path):
    assert predict.folder(tmp_path) == tmp_path
    assert predict.folder(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="there is no model"):
        predict.folder("a" * 5000)


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--output: .* must not exist"):
        predict.run("income", predict.source("rows.csv"), tmp_path)
