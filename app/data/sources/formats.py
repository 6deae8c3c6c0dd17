"""Reading one file of rows, CSV or Parquet, without guessing types; errors name file, row and reason."""

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
"""Suffixes of the file names of each format, in lower case; upper case is accepted too."""
SEPARATORS = ",;\t|"
HEAD_BYTES = 1 << 20
"""Number of bytes in which the header must end."""
BLOCK_BYTES = 4 << 20
"""Size of the blocks in which CSV is parsed, and so the maximum size of a row."""
BATCH_ROWS = 1 << 16
"""Number of rows of the blocks in which Parquet is read."""
NOT_UTF8 = "not UTF-8; save the file as UTF-8 (iconv -f latin1 -t utf8)"
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}
"""Encodings that are not UTF-8, by the bytes at the start of the file."""


@dataclass(frozen=True)
class File:
    """A file of rows, as its head describes it."""

    path: str
    format: str
    schema: pa.Schema
    """Names and types of its columns; in CSV all are strings."""
    separator: str = ","
    """Separator of CSV cells."""


def has_format(path: str, file_format: str) -> bool:
    """Whether a file's name has a suffix of this format."""
    return path.lower().endswith(SUFFIXES[file_format])


def open_file(filesystem: pa.fs.FileSystem, path: str, file_format: str, names: Sequence[str]) -> File:
    """Read a file's head. The separator of a CSV file is the one that finds most of the columns `names`.

    Raises UserError if the file does not have the format.
    """
    try:
        if file_format == "parquet":
            with filesystem.open_input_file(path) as file:
                return File(path, file_format, pa.parquet.ParquetFile(file).schema_arrow)
        with _open_csv(filesystem, path) as stream:
            header, separator = _header(stream.read(HEAD_BYTES), names)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        hint = ""
        if file_format == "parquet" and has_format(path, "csv"):
            hint = "; if it is CSV, set format: csv"
        raise UserError(
            f"{path}: must be a {file_format} file, but it cannot be read: {_one_line(error)}{hint}"
        ) from None
    return File(path, file_format, pa.schema([(name, pa.string()) for name in header]), separator)


def blocks(
    filesystem: pa.fs.FileSystem, file: File, names: Sequence[str], limit: int | None = None
) -> Iterator[pa.Table]:
    """The file's first `limit` rows (None: all), with the columns `names`, unconverted.

    CSV cells are strings; an empty cell is the empty string. Raises UserError, which names the row, if the
    file cannot be read to its end.
    """
    read = _parquet_blocks if file.format == "parquet" else _csv_blocks
    num_left = limit
    for block in read(filesystem, file, names):
        yield block if num_left is None else block.slice(0, num_left)
        num_left = None if num_left is None else num_left - block.num_rows
        if num_left is not None and num_left <= 0:
            return


def _parquet_blocks(filesystem: pa.fs.FileSystem, file: File, names: Sequence[str]) -> Iterator[pa.Table]:
    num_rows = 0
    try:
        with filesystem.open_input_file(file.path) as stream:
            parquet = pa.parquet.ParquetFile(stream)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=list(names)):
                num_rows += batch.num_rows
                yield pa.Table.from_batches([batch]).select(list(names))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: after row {num_rows:,}: cannot be read: {_one_line(error)}") from None


def _csv_blocks(filesystem: pa.fs.FileSystem, file: File, names: Sequence[str]) -> Iterator[pa.Table]:
    ragged_row: pa.csv.InvalidRow | None = None

    def on_ragged_row(row: pa.csv.InvalidRow) -> str:
        nonlocal ragged_row
        ragged_row = ragged_row or row
        return "error"

    # Read in one thread: with several, Arrow's errors have no row number. Read no cell as null: the contract
    # decides what is missing.
    reading = pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    parsing = pa.csv.ParseOptions(
        delimiter=file.separator, newlines_in_values=True, invalid_row_handler=on_ragged_row
    )
    types = {name: pa.string() for name in file.schema.names}
    converting = pa.csv.ConvertOptions(
        column_types=types, include_columns=list(names), strings_can_be_null=False
    )
    try:
        with _open_csv(filesystem, file.path) as stream:
            counter = _QuoteCounter(stream)
            with pa.csv.open_csv(counter, reading, parsing, converting) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            if counter.num_quotes % 2:
                _require_closed_quote(filesystem, file)
    except (pa.ArrowException, OSError) as error:
        reason = _csv_reason(_one_line(error)) if ragged_row is None else _ragged_reason(ragged_row, file)
        raise UserError(f"{file.path}: {reason}") from None


def _ragged_reason(row: pa.csv.InvalidRow, file: File) -> str:
    """What is wrong with a row that has more or fewer cells than the header."""
    if row.actual_columns > row.expected_columns:
        advice = "quote cells that contain the separator"
    else:
        advice = 'is a quote (") not closed?'
    return (
        f"row {row.number:,}: has {row.actual_columns} cells, the header {row.expected_columns} (separator "
        f"{file.separator!r}); {advice}"
    )


def _csv_reason(message: str) -> str:
    """What is wrong with a row according to Arrow's message; the header is row 1."""
    place = re.search(r"Row #(?P<number>\d+): ", message)
    where = f"row {int(place['number']):,}: " if place else ""
    if "invalid UTF8" in message:
        return f"{where}is {NOT_UTF8}"
    if "straddling" in message:
        return f'{where}has a row of more than {BLOCK_BYTES >> 20} MB; is a quote (") not closed?'
    return f"{where}cannot be read: {message[place.end() :] if place else message}"


class _QuoteCounter:
    """A stream that counts the quotation marks that are read."""

    closed = False

    def __init__(self, stream: pa.NativeFile):
        self._stream = stream
        self.num_quotes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(None if size < 0 else size)
        self.num_quotes += data.count(b'"')
        return data


def _require_closed_quote(filesystem: pa.fs.FileSystem, file: File) -> None:
    """Raises UserError if the last cell opens a quote that is never closed: all later rows are part of it."""
    record: list[str] = []
    num_lines = first_line = 0
    with (
        _open_csv(filesystem, file.path) as stream,
        io.TextIOWrapper(stream, "utf-8", "replace", newline="") as text,
    ):

        def lines() -> Iterator[str]:
            nonlocal num_lines
            for line in text:
                num_lines += 1
                record.append(line)
                yield line

        try:
            for _ in csv.reader(lines(), delimiter=file.separator):
                last_record, first_line = record.copy(), num_lines - len(record) + 1
                record.clear()
            next(csv.reader(last_record, delimiter=file.separator, strict=True))
        except csv.Error:
            first_line = num_lines - len(record) + 1 if record else first_line
            raise UserError(
                f'{file.path}: line {first_line:,}: opens a quote (") that is never closed, so that all '
                "later rows are one cell; close it, or double it if it belongs to the text"
            ) from None


def _open_csv(filesystem: pa.fs.FileSystem, path: str) -> pa.NativeFile:
    """The uncompressed bytes of a CSV file."""
    return filesystem.open_input_stream(path, compression="gzip" if path.lower().endswith(".gz") else None)


def _header(head: bytes, names: Sequence[str]) -> tuple[list[str], str]:
    """The column names of a CSV file, and the separator that finds most of the columns `names`.

    Raises ValueError if the head is no header in UTF-8.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"it is {encoding}; save it as UTF-8")
    if b"\0" in head[:4096]:
        raise ValueError("it has NUL bytes: it is binary, or a text in UTF-16; save it as CSV in UTF-8")
    # Replace invalid bytes below the header: the reader of the rows reports them with their row.
    text = head.decode("utf-8-sig", "replace").lstrip("\r\n")
    if not text:
        raise ValueError("it has no header")
    headers = {sep: next(csv.reader(io.StringIO(text, newline=""), delimiter=sep)) for sep in SEPARATORS}

    def num_columns(separator: str) -> tuple[int, int]:
        """Number of columns in `names`, and of all."""
        header = headers[separator]
        return sum(name in header for name in names), len(header)

    separator = max(SEPARATORS, key=num_columns)
    if any("\N{REPLACEMENT CHARACTER}" in name for name in headers[separator]):
        raise ValueError(f"its header is {NOT_UTF8}")
    return headers[separator], separator


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
