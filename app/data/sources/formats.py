"""Reading one file of rows, CSV or Parquet, without guesses of types; errors name file, row and reason."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from app.errors import UserError

SUFFIXES = {"csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"), "parquet": (".parquet",)}
"""How the names of files of a format end, in small or capital letters."""
SEPARATORS = ",;\t|"
HEAD_BYTES = 1 << 20
BLOCK_BYTES = 4 << 20
BATCH_ROWS = 1 << 16
NO_UTF8 = "no UTF-8; save the file as UTF-8 (iconv -f latin1 -t utf8)"
WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}
"""Marks at the start of texts that are not UTF-8."""


@dataclass(frozen=True)
class File:
    """A file of rows, as its head describes it."""

    path: str
    format: str
    schema: pa.Schema
    """Names and types of its columns; of CSV all are strings."""
    separator: str = ","
    """Of CSV."""


def has_format(path: str, file_format: str) -> bool:
    """Whether a file's name says that it has this format."""
    return path.lower().endswith(SUFFIXES[file_format])


def opened(filesystem: pa.fs.FileSystem, path: str, file_format: str, names: Sequence[str]) -> File:
    """Look at a file's head. `names` are the columns that matter: they tell a CSV file's separator.

    Raises UserError if it is no such file.
    """
    try:
        if file_format == "parquet":
            with filesystem.open_input_file(path) as file:
                return File(path, file_format, pa.parquet.ParquetFile(file).schema_arrow)
        with _stream(filesystem, path) as stream:
            header, separator = _header(stream.read(HEAD_BYTES), names)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        hint = ""
        if file_format == "parquet" and has_format(path, "csv"):
            hint = "; if it is CSV, say format: csv"
        raise UserError(f"{path}: is no readable {file_format} file: {_line(error)}{hint}") from None
    return File(path, file_format, pa.schema([(name, pa.string()) for name in header]), separator)


def blocks(
    filesystem: pa.fs.FileSystem, file: File, names: Sequence[str], limit: int | None = None
) -> Iterator[pa.Table]:
    """The file's first `limit` rows, all if None, with the columns `names`, as they stand there.

    CSV cells are strings, and an empty one is the empty string. Raises UserError, which names the row, if the
    file cannot be read to its end.
    """
    read = _parquet_blocks if file.format == "parquet" else _csv_blocks
    left = limit
    for block in read(filesystem, file, names):
        yield block if left is None else block.slice(0, left)
        left = None if left is None else left - block.num_rows
        if left is not None and left <= 0:
            return


def _parquet_blocks(filesystem: pa.fs.FileSystem, file: File, names: Sequence[str]) -> Iterator[pa.Table]:
    num_rows = 0
    try:
        with filesystem.open_input_file(file.path) as source:
            parquet = pa.parquet.ParquetFile(source)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=list(names)):
                num_rows += batch.num_rows
                yield pa.Table.from_batches([batch]).select(list(names))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: after row {num_rows:,}: cannot be read: {_line(error)}") from None


def _csv_blocks(filesystem: pa.fs.FileSystem, file: File, names: Sequence[str]) -> Iterator[pa.Table]:
    ragged: list[pa.csv.InvalidRow] = []

    def note(row: pa.csv.InvalidRow) -> str:
        ragged.append(row)
        return "error"

    # One thread, or rows have no numbers. Nothing is null here: what is missing is the contract's affair.
    reading = pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    parsing = pa.csv.ParseOptions(delimiter=file.separator, newlines_in_values=True, invalid_row_handler=note)
    types = {name: pa.string() for name in file.schema.names}
    converting = pa.csv.ConvertOptions(
        column_types=types, include_columns=list(names), strings_can_be_null=False
    )
    try:
        with _stream(filesystem, file.path) as stream:
            counted = _Quotes(stream)
            with pa.csv.open_csv(counted, reading, parsing, converting) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            if counted.num_quotes % 2:
                _require_closed(filesystem, file)
    except (pa.ArrowException, OSError) as error:
        if ragged:
            row = ragged[0]
            many = row.actual_columns > row.expected_columns
            todo = "quote cells that have the separator in them" if many else 'is a quote (") not closed?'
            reason = (
                f"has {row.actual_columns} cells, the header {row.expected_columns} (separator "
                f"{file.separator!r}); {todo}"
            )
            raise UserError(f"{file.path}: row {row.number:,}: {reason}") from None
        raise UserError(f"{file.path}: {_csv_reason(_line(error))}") from None


def _csv_reason(message: str) -> str:
    """What is wrong with a row, of what Arrow says; the header is row 1."""
    place = re.search(r"Row #(\d+): ", message)
    where = f"row {int(place[1]):,}: " if place else ""
    if "invalid UTF8" in message:
        return f"{where}is {NO_UTF8}"
    if "straddling" in message:
        return f'{where}has a row of more than {BLOCK_BYTES >> 20} MB; is a quote (") not closed?'
    return f"{where}cannot be read: {message[place.end() :] if place else message}"


class _Quotes:
    """A stream that counts quotation marks as it is read."""

    closed = False

    def __init__(self, stream: pa.NativeFile):
        self._stream = stream
        self.num_quotes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(None if size < 0 else size)
        self.num_quotes += data.count(b'"')
        return data


def _require_closed(filesystem: pa.fs.FileSystem, file: File) -> None:
    """Raise UserError if the last cell begins with a quote that nothing closes: all later rows are in it."""
    record: list[str] = []
    line = begun = 0
    with (
        _stream(filesystem, file.path) as stream,
        io.TextIOWrapper(stream, "utf-8", "replace", newline="") as text,
    ):

        def lines() -> Iterator[str]:
            nonlocal line
            for each in text:
                line += 1
                record.append(each)
                yield each

        try:
            for _ in csv.reader(lines(), delimiter=file.separator):
                last, begun = record.copy(), line - len(record) + 1
                record.clear()
            next(csv.reader(last, delimiter=file.separator, strict=True))
        except csv.Error:
            begun = line - len(record) + 1 if record else begun
            raise UserError(
                f'{file.path}: line {begun:,}: opens a quote (") that is never closed, so that all later '
                "rows are one cell; close it, or double it if it belongs to the text"
            ) from None


def _stream(filesystem: pa.fs.FileSystem, path: str) -> pa.NativeFile:
    """The bytes of a CSV file, unpacked."""
    return filesystem.open_input_stream(path, compression="gzip" if path.lower().endswith(".gz") else None)


def _header(head: bytes, names: Sequence[str]) -> tuple[list[str], str]:
    """The column names of a CSV file, and the separator by which most of `names` are among them.

    Raises ValueError if there is no header in UTF-8.
    """
    for mark, encoding in WIDE.items():
        if head.startswith(mark):
            raise ValueError(f"it is {encoding}; save it as UTF-8")
    if b"\0" in head[:4096]:
        raise ValueError("it has NUL bytes: it is binary, or a text in UTF-16; save it as CSV in UTF-8")
    # The rows below the header may be in error: what reads them says in which row.
    text = head.decode("utf-8-sig", "replace").lstrip("\r\n")
    if not text:
        raise ValueError("it has no header")
    headers = {sep: next(csv.reader(io.StringIO(text, newline=""), delimiter=sep)) for sep in SEPARATORS}

    def fits(separator: str) -> tuple[int, int]:
        header = headers[separator]
        return sum(name in header for name in names), len(header)

    separator = max(SEPARATORS, key=fits)
    if any("\N{REPLACEMENT CHARACTER}" in name for name in headers[separator]):
        raise ValueError(f"its header is {NO_UTF8}")
    return headers[separator], separator


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
