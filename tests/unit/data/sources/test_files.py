from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from app.config import Data, Source
from app.data.sources import samples
from app.data.sources.files import Files, kinds, version
from app.errors import UserError

TABLE = pa.table({"age": [1.5, 2.5], "town": ["a", "b"], "bought": ["yes", "no"], "other": [1, 2]})


def contract(path, file_format: str = "parquet") -> Data:
    return Data.model_validate(
        {
            "source": {"path": str(path), "format": file_format},
            "label": {"column": "bought", "positive": "yes"},
            "columns": {"age": {"type": "number"}, "town": {"type": "category"}},
        }
    )


def check(path, file_format: str = "parquet") -> None:
    data = contract(path, file_format)
    Files(data.source).check(kinds(data))


def fault(path, file_format: str = "parquet") -> str:
    with pytest.raises(UserError) as caught:
        check(path, file_format)
    assert str(caught.value).startswith("data.source: ")
    return str(caught.value)


@pytest.fixture
def parquet(tmp_path):
    def write(table: pa.Table, name: str = "rows.parquet"):
        pa.parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    return write


def test_a_file_with_more_columns_than_the_contract_is_valid(parquet):
    check(parquet(TABLE))


def test_a_csv_file_with_any_cells_is_valid(tmp_path):
    (tmp_path / "rows.csv").write_text("town,bought,age\n3,1,young\n,,\n")
    check(tmp_path / "rows.csv", "csv")


def test_a_folder_has_its_files_of_the_format_sorted(tmp_path, parquet):
    (tmp_path / "deep").mkdir()
    for name in ("b.parquet", "a.parquet", "deep/c.parquet"):
        parquet(TABLE, name)
    (tmp_path / "notes.txt").write_text("not a row")
    check(tmp_path)
    paths = Files(Source(path=str(tmp_path))).paths
    assert paths == [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "deep/c.parquet")]


def test_a_relative_path_and_a_uri_are_the_same_file(tmp_path, parquet, monkeypatch):
    file = parquet(TABLE)
    monkeypatch.chdir(tmp_path)
    assert Files(Source(path="rows.parquet")).paths == Files(Source(path=file.as_uri())).paths == [str(file)]


@pytest.mark.parametrize("name", ["none.parquet", "none/", "file:///none.parquet"])
def test_a_missing_file_is_named_with_its_absolute_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fault(name)
    assert f"{name}: no such file or folder (looked for /" in message


def test_a_uri_of_an_unknown_file_system_is_refused():
    assert "cannot be opened" in fault("nonsense://bucket/rows.parquet")


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_a_file_of_zero_bytes_is_refused(tmp_path, file_format):
    file = tmp_path / f"rows.{file_format}"
    file.touch()
    assert f"{file}: empty (0 bytes)" in fault(file, file_format)


def test_an_empty_file_in_a_folder_is_named(tmp_path, parquet):
    parquet(TABLE)
    (tmp_path / "second.parquet").touch()
    assert f"{tmp_path / 'second.parquet'}: empty (0 bytes)" in fault(tmp_path)


def test_columns_without_rows_are_refused(tmp_path, parquet):
    assert "has columns but no rows" in fault(parquet(TABLE.slice(0, 0)))
    (tmp_path / "rows.csv").write_text("age,town,bought\n")
    assert "has columns but no rows" in fault(tmp_path / "rows.csv", "csv")


def test_one_file_of_a_folder_may_have_no_rows(tmp_path, parquet):
    parquet(TABLE, "a.parquet")
    parquet(TABLE.slice(0, 0), "b.parquet")
    check(tmp_path)


def test_a_folder_without_files_of_the_format_is_refused(tmp_path, parquet):
    parquet(TABLE)
    assert "the folder must have csv files" in fault(tmp_path, "csv")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("age", "column 'age' is missing; the file has 'town', 'bought', 'other'"),
        ("bought", "the label 'bought' is missing; the file has 'age', 'town', 'other'"),
    ],
)
def test_a_missing_column_is_named_with_the_existing_ones(tmp_path, parquet, dropped, message):
    table = TABLE.drop_columns([dropped])
    assert message in fault(parquet(table))
    names = ",".join(table.column_names)
    (tmp_path / "rows.csv").write_text(f"{names}\n1,2,3\n")
    assert message in fault(tmp_path / "rows.csv", "csv")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("age", ["1", "2"], "column 'age' must hold numbers, but its type is string"),
        ("town", [1, 2], "column 'town' must hold strings, but its type is int64"),
        ("bought", [0.5, 1.0], "'bought' must hold strings, integers or booleans, but its type is double"),
        ("town", pa.array([1, 2], pa.timestamp("s")), "'town' must hold strings, but its type is timestamp"),
    ],
)  # fmt: skip
def test_a_parquet_column_of_a_wrong_type_is_refused(parquet, name, values, message):
    table = TABLE.set_column(TABLE.column_names.index(name), name, pa.array(values))
    assert message in fault(parquet(table))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("age", pa.array([1, 2], pa.int8())),
        ("age", pa.array([True, False])),
        ("age", pa.array([Decimal("1.5"), None])),
        ("age", pa.nulls(2)),
        ("age", pa.array([1, 2]).dictionary_encode()),
        ("town", pa.array(["a", "b"]).dictionary_encode()),
        ("town", pa.array(["a", "b"], pa.large_string())),
        ("bought", pa.array([1, 0])),
        ("bought", pa.array([True, False])),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_parquet_types_that_fit_the_contract(parquet, name, values):
    check(parquet(TABLE.set_column(TABLE.column_names.index(name), name, values)))


def test_faults_of_all_files_are_reported_together(tmp_path, parquet):
    parquet(TABLE.drop_columns(["age", "town"]), "a.parquet")
    parquet(TABLE.drop_columns(["bought"]), "b.parquet")
    lines = fault(tmp_path).replace(f"data.source: {tmp_path}/", "").splitlines()
    assert lines == [
        "a.parquet: column 'age', column 'town' are missing; the file has 'bought', 'other'",
        "b.parquet: the label 'bought' is missing; the file has 'age', 'town', 'other'",
    ]


@pytest.mark.parametrize("content", [b"garbage" * 100, b"PAR1" + bytes(200) + b"PAR1", b"x"])
def test_bytes_that_are_not_parquet_are_refused_with_the_file(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    assert f"{tmp_path}/rows.parquet: must be a parquet file, but it" in fault(tmp_path / "rows.parquet")


def test_text_that_is_not_csv_is_refused_with_the_file(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\n")
    message = fault(tmp_path / "rows.csv", "csv")
    assert f"{tmp_path}/rows.csv: must be a csv file, but it cannot be read: it has no header" in message


def test_an_unknown_sample_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no sample data set is called 'iris'; there are: adult, "):
        Files(Source(sample="iris"))


@pytest.mark.parametrize("name", samples.DATA_SETS)
def test_a_sample_is_a_file(name):
    files = Files(Source(sample=name))
    assert files.paths == [str(samples.path(name))]


def test_the_version_depends_on_names_and_contents_not_on_the_folder(tmp_path):
    def stored(folder: str, **files: str) -> str:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / f"{name}.csv").write_text(text)
        return version(Source(path=str(tmp_path / folder), format="csv"))

    first = stored("first", a="x\n1\n", b="x\n2\n")
    assert stored("moved", a="x\n1\n", b="x\n2\n") == first
    others = [
        stored("changed", a="x\n1\n", b="x\n3\n"),
        stored("more", a="x\n1\n", b="x\n2\n", c="x\n2\n"),
        stored("fewer", a="x\n1\n"),
        stored("swapped", a="x\n2\n", b="x\n1\n"),
        stored("cut elsewhere", a="x\n", b="1\nx\n2\n"),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_a_column_that_occurs_twice_is_refused(tmp_path, parquet, file_format):
    twice = pa.table(
        [[1.0], [2.0], ["a"], ["yes"]],
        names=["age", "age", "town", "bought"],
    )
    (tmp_path / "rows.csv").write_text("age,age,town,bought\n1,2,a,yes\n")
    file = parquet(twice).with_suffix(f".{file_format}")
    assert "'age'" in fault(file, file_format)


def test_the_time_column_of_a_split_is_read(parquet):
    path = parquet(TABLE)
    split = {"by": "time", "column": "day"}
    data = Data.model_validate({**contract(path).model_dump(), "split": split})
    with pytest.raises(
        UserError, match="column 'day' is missing; the file has 'age', 'town', 'bought', 'other'"
    ):
        Files(data.source).check(kinds(data))
    parquet(TABLE.append_column("day", pa.array([0, 1], pa.timestamp("s"))))
    Files(data.source).check(kinds(data))


def test_a_label_with_a_threshold_must_hold_numbers(parquet):
    path = parquet(TABLE)
    label = {"column": "bought", "above": 15}
    data = Data.model_validate({**contract(path).model_dump(), "label": label})
    with pytest.raises(UserError, match="column 'bought' must hold numbers, but its type is string"):
        Files(data.source).check(kinds(data))
