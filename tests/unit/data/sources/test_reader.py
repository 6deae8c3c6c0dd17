import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

from app.data.sources import formats
from app.data.sources.reader import Reader, prefix_errors, read_files
from app.errors import UserError

LOCAL = pa.fs.LocalFileSystem()
SCHEMA = pa.schema([("a", pa.float64()), ("b", pa.string())])


@pytest.fixture
def reader(tmp_path) -> Reader:
    """A reader of two files: one with integers and a dictionary, one without the column b."""
    tables = [
        pa.table({"b": pa.array(["x", "y"]).dictionary_encode(), "a": [1, 2]}),
        pa.table({"a": [0.5], "other": [1]}),
    ]
    files = []
    for number, table in enumerate(tables):
        path = tmp_path / f"{number}.parquet"
        pa.parquet.write_table(table, path)
        files.append(formats.open_file(LOCAL, str(path), "parquet", ["a"]))
    return Reader(LOCAL, tuple(files), SCHEMA, None, "data.source")


def test_columns_are_cast_and_missing_ones_are_null(reader):
    first, second = (pa.concat_tables(reader.blocks(file)) for file in reader.files)
    assert first.schema == second.schema == SCHEMA
    assert first.to_pylist() == [{"a": 1.0, "b": "x"}, {"a": 2.0, "b": "y"}]
    assert second.to_pylist() == [{"a": 0.5, "b": None}]


def test_files_are_read_by_their_indices(reader):
    blocks = read_files(pa.table({"id": [1, 0]}), reader)
    assert pa.concat_tables(blocks)["a"].to_pylist() == [0.5, 1.0, 2.0]


def test_an_error_names_the_setting():
    with pytest.raises(UserError, match=r"^--input: x: is broken$"), prefix_errors("--input"):
        raise UserError("x: is broken")
