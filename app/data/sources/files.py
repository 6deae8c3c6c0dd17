"""The files of a source, read as a Ray Dataset of Arrow blocks in which each column has one type."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs

from app.config import Data, Source
from app.data.sources import formats, samples
from app.data.sources.column_types import CONTENT, Kind, common_type, family, fits
from app.data.sources.formats import File
from app.data.sources.reader import Reader, prefix_errors, read_files
from app.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

CHUNK_BYTES = 1 << 22
"""Number of bytes that are read and hashed at a time."""


def read(data: Data) -> "Dataset":
    """The source's rows, with the columns of the contract, the label and the time.

    A column has one type in all files; CSV cells are strings. Values are checked by `app.data.contract`.
    Raises UserError for a missing or empty file, a missing column, or a Parquet column of a wrong type.
    Executing the Dataset raises UserError for a file that cannot be read to its end.
    """
    files = Files(data.source)
    columns = kinds(data)
    types = files.check(columns)
    return files.read(pa.schema([(name, types[name]) for name in columns]), data.source.limit)


def kinds(data: Data) -> dict[str, Kind]:
    """The kind of every column that is read."""
    columns: dict[str, Kind] = {name: column.type for name, column in data.columns.items()}
    if data.label:
        columns[data.label.column] = "number" if data.label.above is not None else "label"
    if data.time:
        columns.setdefault(data.time, "time")
    return columns


def version(source: Source) -> str:
    """The data version: the SHA-256 of the names and contents of the source's files."""
    files = Files(source)
    digest = hashlib.sha256()
    for path in files.paths:
        digest.update(Path(path).name.encode() + b"\0")
        # Hash the stored bytes: Arrow would decompress a .gz file.
        with files.filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


class Files:
    """The files of a source, sorted by path, and their file system."""

    def __init__(self, source: Source, setting: str = "data.source"):
        """`setting` is the name of the source for messages. Raises UserError if there is no file, or an
        empty one."""
        self.source = source
        self.setting = setting
        self.name = str(samples.path(source.sample)) if source.sample else str(source.path)
        self._opened: list[File] = []
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
        infos = self._files_in(root) if info.type == pa.fs.FileType.Directory else [info]
        if empty := [info.path for info in infos if info.size == 0]:
            raise UserError(
                f"{setting}: {', '.join(empty)}: empty (0 bytes); give a {source.format} file with rows"
            )
        self.paths = [info.path for info in infos]

    @property
    def format(self) -> str:
        """Format of the files: `csv` or `parquet`."""
        return self.source.format

    def _files_in(self, folder: str) -> list[pa.fs.FileInfo]:
        infos = self.filesystem.get_file_info(pa.fs.FileSelector(folder, recursive=True))
        files = [info for info in infos if info.is_file and formats.has_format(info.path, self.format)]
        if not files:
            suffixes = ", ".join(formats.SUFFIXES[self.format])
            raise UserError(
                f"{self.setting}: {self.name}: the folder must have {self.format} files, whose names end in "
                f"{suffixes}; it has none"
            )
        return sorted(files, key=lambda info: info.path)

    def check(self, columns: Mapping[str, Kind]) -> dict[str, pa.DataType]:
        """Read the heads of the files, and check the columns, their types, and that there are rows.

        Returns the type of each of `columns`, the same for all files. Raises UserError with all faults.
        """
        faults: list[str] = []
        self._opened = []
        for path in self.paths:
            with prefix_errors(self.setting):
                file = formats.open_file(self.filesystem, path, self.format, list(columns))
            faults += [f"{path}: {fault}" for fault in _schema_faults(file, columns)]
            self._opened.append(file)
        if not faults:
            conflicts = [self._type_conflict(name, kind) for name, kind in columns.items()]
            faults = [fault for fault in conflicts if fault is not None]
        if not faults:
            with prefix_errors(self.setting):
                if not self._has_rows(list(columns)):
                    faults = [f"{self.name}: has columns but no rows"]
        if faults:
            raise UserError("\n".join(f"{self.setting}: {fault}" for fault in faults))
        return {
            name: common_type([file.schema.field(name).type for file in self._opened], kind)
            for name, kind in columns.items()
        }

    def all_columns(self, columns: Mapping[str, Kind]) -> pa.Schema:
        """All columns of the checked files, among them those of the contract, `columns`.

        A column with several types is text; a column that a file lacks is null there. Raises UserError if a
        column occurs twice in a file.
        """
        types: dict[str, list[pa.DataType]] = {}
        for file in self._opened:
            for name in file.schema.names:
                if (count := file.schema.names.count(name)) > 1:
                    raise UserError(
                        f"{self.setting}: {file.path}: column {name!r} must occur once, but it occurs "
                        f"{count} times; rename it"
                    )
                types.setdefault(name, []).append(file.schema.field(name).type)
        return pa.schema(
            [(name, common_type(file_types, columns.get(name))) for name, file_types in types.items()]
        )

    def read(self, schema: pa.Schema, limit: int | None = None) -> "Dataset":
        """The rows of the checked files with the columns of `schema`. Needs Ray."""
        import ray.data

        context = ray.data.DataContext.get_current()
        # Without this, the order of rows, and with it that of batches and answers, varies between runs.
        context.execution_options.preserve_order = True
        # Deliver a UserError of a worker as it is, not wrapped.
        context.raise_original_map_exception = True
        indices = ray.data.range(len(self._opened), override_num_blocks=len(self._opened))
        kwargs = {"reader": self.reader(schema, limit)}
        rows = indices.map_batches(read_files, fn_kwargs=kwargs, batch_size=1, batch_format="pyarrow")
        return rows.limit(limit) if limit else rows

    def reader(self, schema: pa.Schema, limit: int | None = None) -> Reader:
        """The reader of the checked files, for this process or a worker."""
        return Reader(self.filesystem, tuple(self._opened), schema, limit, self.setting)

    def _has_rows(self, names: list[str]) -> bool:
        return any(
            block.num_rows
            for file in self._opened
            for block in formats.blocks(self.filesystem, file, names, limit=1)
        )

    def _type_conflict(self, name: str, kind: Kind) -> str | None:
        """The fault if two files have a column in types of different families."""
        first: File | None = None
        for file in self._opened:
            column_type = file.schema.field(name).type
            if family(column_type, kind) is None:
                continue
            if first is None:
                first = file
            first_type = first.schema.field(name).type
            if family(column_type, kind) != family(first_type, kind):
                return (
                    f"column {name!r} must have one type in all files, but it is {first_type} in "
                    f"{first.path} and {column_type} in {file.path}; write it with one type"
                )
        return None


def _schema_faults(file: File, columns: Mapping[str, Kind]) -> list[str]:
    """Columns that are missing, occur twice or have a wrong type."""
    faults = []
    names = file.schema.names
    missing = [
        f"{'the label' if kind == 'label' else 'column'} {name!r}"
        for name, kind in columns.items()
        if name not in names
    ]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        hint = "; is its first row a header?" if len(missing) == len(columns) else ""
        faults.append(
            f"{', '.join(missing)} {verb} missing; the file has {', '.join(map(repr, names))}{hint}"
        )
    for name, kind in columns.items():
        if name not in names:
            continue
        if (count := names.count(name)) > 1:
            faults.append(f"column {name!r} must occur once, but it occurs {count} times")
            continue
        column_type = file.schema.field(name).type
        if file.format == "parquet" and not fits(column_type, kind):
            faults.append(f"column {name!r} must hold {CONTENT[kind]}, but its type is {column_type}")
    return faults
