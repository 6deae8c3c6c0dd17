"""Raw data as a Ray Dataset of Arrow blocks with just the columns of the contract, typed."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from app.config import Data, Source
from app.data import samples
from app.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset


def read(data: Data) -> "Dataset":
    """The source's rows with the columns of the contract and the label, as they stand in the files.

    CSV cells are strings here: turning them into numbers, and saying which cannot be, is the contract's
    affair (`app.data.schema`), as are all values. Raises UserError for a missing or empty file, a
    missing column, or a Parquet column of another type.
    """
    import ray.data

    files = Files(data.source)
    names = data.names
    files.check(data)
    if data.source.format == "csv":
        as_text = pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            include_columns=names,
            strings_can_be_null=True,
        )
        rows = ray.data.read_csv(files.paths, filesystem=files.filesystem, convert_options=as_text)
    else:
        rows = ray.data.read_parquet(files.paths, filesystem=files.filesystem).select_columns(names)
    return rows.limit(data.source.limit) if data.source.limit else rows


def version(source: Source) -> str:
    """The SHA-256 of the source's files, their names and contents: what a data version is here."""
    files = Files(source)
    digest = hashlib.sha256()
    for path in files.paths:
        digest.update(Path(path).name.encode() + b"\0")
        with files.filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


class Files:
    """The files of a source, sorted by path, and the file system they are on."""

    def __init__(self, source: Source, setting: str = "data.source"):
        """Raises UserError, which names the setting, if there is no such file, or an empty one."""
        self.source = source
        self.name = str(samples.path(source.sample)) if source.sample else str(source.path)
        try:
            if "://" in self.name:
                self.filesystem, root = pa.fs.FileSystem.from_uri(self.name)
            else:
                self.filesystem, root = pa.fs.LocalFileSystem(), str(Path(self.name).expanduser().resolve())
            info = self.filesystem.get_file_info(root)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{setting}: {self.name}: cannot be opened: {error}") from None
        if info.type == pa.fs.FileType.NotFound:
            raise UserError(f"{setting}: {self.name}: no such file or folder (looked for {root})")
        if info.type == pa.fs.FileType.Directory:
            found = self.filesystem.get_file_info(pa.fs.FileSelector(root, recursive=True))
            infos = sorted(
                (f for f in found if f.is_file and f.extension == source.format), key=lambda f: f.path
            )
            if not infos:
                raise UserError(f"{setting}: {self.name}: the folder has no .{source.format} file")
        else:
            infos = [info]
        if empty := [f.path for f in infos if f.size == 0]:
            raise UserError(
                f"{setting}: {', '.join(empty)}: empty (0 bytes); give a {source.format} file with rows"
            )
        self.paths = [f.path for f in infos]

    def check(self, data: Data) -> None:
        """Look at the files' heads before anything is started: columns, types, and that there are rows."""
        faults: list[str] = []
        num_rows = 0
        for path in self.paths:
            schema, rows = self._head(path)
            num_rows += rows
            faults += [f"{path}: {fault}" for fault in _schema_faults(schema, data)]
        if not num_rows and not faults:
            faults = [f"{self.name}: has columns but no rows"]
        if faults:
            raise UserError("\n".join(f"data.source: {fault}" for fault in faults))

    def _head(self, path: str) -> tuple[pa.Schema, int]:
        """The schema of a file and its number of rows (of CSV, those in the first block)."""
        with self.filesystem.open_input_file(path) as file:
            try:
                if self.source.format == "parquet":
                    parquet = pa.parquet.ParquetFile(file)
                    return parquet.schema_arrow, parquet.metadata.num_rows
                # As strings: types are the conversion's affair, here only the names and that it parses.
                with pa.csv.open_csv(file) as reader:
                    names = reader.schema.names
                    rows = next((b.num_rows for b in _batches(reader) if b.num_rows), 0)
                return pa.schema([(name, pa.string()) for name in names]), rows
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"data.source: {path}: is no readable {self.source.format} file: {error}"
                ) from None


def _batches(reader: pa.csv.CSVStreamingReader) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            return


def _schema_faults(schema: pa.Schema, data: Data) -> list[str]:
    faults = []
    for name in data.names:
        kind = _kind(name, data)
        if name not in schema.names:
            role = "the label" if data.label and name == data.label.column else "column"
            faults.append(f"{role} {name!r} is missing; the file has {', '.join(schema.names)}")
        elif schema.names.count(name) > 1:
            faults.append(f"column {name!r} stands {schema.names.count(name)} times")
        elif data.source.format == "parquet":
            have = schema.field(name).type
            if not _fits(have, kind):
                must = {
                    "number": "numbers",
                    "category": "strings",
                    "text": "strings",
                    "label": "strings, integers or booleans",
                    "time": "timestamps, dates, ISO 8601 text or numbers",
                }[kind]
                faults.append(f"column {name!r} must hold {must}, but its type is {have}")
    return faults


def _kind(name: str, data: Data) -> str:
    """What a column must hold."""
    if data.label and name == data.label.column:
        return "number" if data.label.above is not None else "label"
    return data.columns[name].type if name in data.columns else "time"


def _fits(have: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(have):
        have = have.value_type
    if pa.types.is_null(have) or (kind == "time" and pa.types.is_temporal(have)):
        return True
    if kind == "number":
        return any(
            is_(have)
            for is_ in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
        )
    is_string = any(
        is_(have) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
    if kind == "time":
        return is_string or pa.types.is_integer(have) or pa.types.is_floating(have)
    return is_string or (kind == "label" and (pa.types.is_integer(have) or pa.types.is_boolean(have)))
