import gzip

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

from app.data.sources import formats
from app.errors import UserError

LOCAL = pa.fs.LocalFileSystem()
NAMES = ["a", "b"]


def rows(path, content: bytes, names=NAMES, limit=None) -> list[tuple]:
    path.write_bytes(content)
    file_format = "parquet" if path.suffix == ".parquet" else "csv"
    file = formats.open_file(LOCAL, str(path), file_format, names)
    table = pa.concat_tables(formats.blocks(LOCAL, file, names, limit))
    return list(zip(*table.to_pydict().values(), strict=True))


def fault(path, content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        rows(path, content)
    (line,) = str(caught.value).splitlines()
    return line.replace(f"{path}: ", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b"a,b\n1,x\n,NA\n"),
        ("x.CSV", b"a,b\n1,x\n,NA\n"),
        ("x.csv", b"\xef\xbb\xbfa,b\r\n1,x\r\n,NA\r\n"),
        ("x.csv", b"a,b\r1,x\r,NA\r"),
        ("x.csv", b"\n\nb,more,a\nx,\xe9,1\n\nNA,,\n"),
        ("x.csv", b"a;b\n1;x\n;NA"),
        ("x.csv", b'"a"|"b"\n"1"|"x"\n""|"NA"\n'),
        ("x.tsv", b"a\tb\n1\tx\n\tNA\n"),
        ("x.csv.gz", gzip.compress(b"a,b\n1,x\n,NA\n", mtime=0)),
        ("x.CSV.GZ", gzip.compress(b"a,b\n1,x\n,NA\n", mtime=0)),
        ("x.csv", b"a,b,\n1,x,\n,NA,\n"),
    ],
)
def test_csv_of_many_programs_has_unchanged_cells(tmp_path, name, content):
    assert rows(tmp_path / name, content) == [("1", "x"), ("", "NA")]


def test_a_quoted_cell_may_hold_separators_quotes_and_newlines(tmp_path):
    content = b"a,b\n" + b"1,x\n" * 400_000 + b'2,"one, ""two""\nthree"\n3,5" pipe\n'
    table = rows(tmp_path / "x.csv", content)
    assert len(table) == 400_002
    assert table[-2:] == [("2", 'one, "two"\nthree'), ("3", '5" pipe')]


def test_the_limit_of_rows(tmp_path):
    assert rows(tmp_path / "x.csv", b"a,b\n1,x\n2,y\n3,z\n", limit=2) == [("1", "x"), ("2", "y")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1,x\n" * 120_000 + b"1,x,y\n1,x\n", "row 120,002: has 3 cells, the header 2 (separator ',')"),
        (b"1,x\n" * 120_000 + b"1\n", "row 120,002: has 1 cells, the header 2"),
        (b"1,x\n" * 120_000 + b"1,caf\xe9\n", "row 120,002: is not UTF-8; save the file as UTF-8 (iconv"),
        (b'1,x\n2,"y\n' + b"1,x\n" * 120_000, "line 3: opens a quote (\") that is never closed"),
    ],
    ids=["longer", "shorter", "latin-1", "quote"],
)  # fmt: skip
def test_an_unreadable_row_is_named(tmp_path, content, message):
    assert fault(tmp_path / "x.csv", b"a,b\n" + content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,x\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("a,b\n1,x\n".encode("utf-16-le"), "it has NUL bytes"),
        ("a,b,größe\n1,x,y\n".encode("latin-1"), "its header is not UTF-8"),
        (b"", "it has no header"),
        (b"\xef\xbb\xbf\r\n", "it has no header"),
    ],
)
def test_an_unreadable_head_is_refused_with_advice(tmp_path, content, message):
    assert fault(tmp_path / "x.csv", content).startswith(
        f"must be a csv file, but it cannot be read: {message}"
    )


def test_a_broken_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(b"a,b\n" + b"1,x\n" * 500_000, mtime=0)
    assert "cannot be read" in fault(tmp_path / "x.csv.gz", whole[:-400])
    assert "must be a csv file, but it cannot be read" in fault(tmp_path / "x.csv.gz", b"a,b\n1,x\n")


def test_parquet_that_is_broken_in_its_middle_is_refused_with_the_row(tmp_path):
    table = pa.table({"a": list(range(200_000)), "b": ["x"] * 200_000})
    pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=100_000, use_dictionary=False)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    middle = len(content) // 2
    content[middle - 2000 : middle + 2000] = b"\xff" * 4000
    assert fault(tmp_path / "x.parquet", bytes(content)).startswith("after row ")


def test_csv_read_as_parquet_is_refused_with_advice(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"a,b\n1,x\n")
    with pytest.raises(UserError, match=r"must be a parquet file, but .*; if it is CSV, set format: csv"):
        formats.open_file(LOCAL, str(tmp_path / "x.csv"), "parquet", NAMES)
