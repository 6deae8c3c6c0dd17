"""Raw data as a Ray Dataset of Arrow blocks with just the columns of the contract, typed."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.fs

from app.config import Data, Source
from app.data.cells import is_number, is_string
from app.data.sources import formats, samples
from app.data.sources.formats import File
from app.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset


Kind = Literal["number", "category", "text", "label", "time"]
"""What a column must hold; a label with a threshold is a number."""

MUST_HOLD: dict[Kind, str] = {
    "number": "numbers",
    "category": "strings",
    "text": "strings",
    "label": "strings, integers or booleans",
    "time": "timestamps, dates, ISO 8601 text or numbers",
}


def read(data: Data) -> "Dataset":
    """The source's rows with the columns of the contract and the label.

    A column has one type in all files; CSV cells are strings. Turning them into numbers, and saying which
    cannot be, is the contract's affair (`app.data.contract`), as are all values. Raises UserError for a
    missing or empty file, a missing column, or a Parquet column of another type; running the Dataset raises
    one for a file that cannot be read to its end.
    """
    files = Files(data.source)
    wanted = kinds(data)
    types = files.check(wanted)
    return files.read(pa.schema([(name, types[name]) for name in wanted]), data.source.limit)


def kinds(data: Data) -> dict[str, Kind]:
    """Every column that is read, and what it must hold."""
    found: dict[str, Kind] = {name: column.type for name, column in data.columns.items()}
    if data.label:
        found[data.label.column] = "number" if data.label.above is not None else "label"
    if data.time:
        found.setdefault(data.time, "time")
    return found


def version(source: Source) -> str:
    """The SHA-256 of the source's files, their names and contents: what a data version is here."""
    files = Files(source)
    digest = hashlib.sha256()
    for path in files.paths:
        digest.update(Path(path).name.encode() + b"\0")
        # As they are on disk: not unpacked.
        with files.filesystem.open_input_stream(path, compression=None) as stream:
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
            named = [f for f in found if f.is_file and formats.has_format(f.path, source.format)]
            infos = sorted(named, key=lambda f: f.path)
            if not infos:
                suffixes = ", ".join(formats.SUFFIXES[source.format])
                raise UserError(
                    f"{setting}: {self.name}: the folder has no .{source.format} file; their names end in "
                    f"{suffixes}"
                )
        else:
            infos = [info]
        if empty := [f.path for f in infos if f.size == 0]:
            raise UserError(
                f"{setting}: {', '.join(empty)}: empty (0 bytes); give a {source.format} file with rows"
            )
        self.paths = [f.path for f in infos]

        self.setting = setting
        self._opened: list[File] = []

    def check(self, wanted: Mapping[str, Kind]) -> dict[str, pa.DataType]:
        """Look at the files' heads before anything is started: columns, types, and that there are rows.

        Returns the type of each wanted column, one for all files. Raises UserError with all faults.
        """
        faults: list[str] = []
        self._opened = []
        for path in self.paths:
            with _of_setting(self.setting):
                file = formats.opened(self.filesystem, path, self.format, list(wanted))
            faults += [f"{path}: {fault}" for fault in _schema_faults(file, wanted)]
            self._opened.append(file)
        if not faults:
            faults = [fault for name, kind in wanted.items() for fault in self._mixed(name, kind)]
        if not faults:
            with _of_setting(self.setting):
                if not self._has_rows(list(wanted)):
                    faults = [f"{self.name}: has columns but no rows"]
        if faults:
            raise UserError("\n".join(f"{self.setting}: {fault}" for fault in faults))
        return {
            name: _unified([f.schema.field(name).type for f in self._opened], kind)
            for name, kind in wanted.items()
        }

    def carried(self, wanted: Mapping[str, Kind]) -> pa.Schema:
        """All columns of the files that `check` has looked at, those of `wanted` among them.

        A column of several types becomes text, and one that a file lacks is null there. Raises UserError if
        a column stands twice.
        """
        types: dict[str, list[pa.DataType]] = {}
        for file in self._opened:
            for name in file.schema.names:
                if (times := file.schema.names.count(name)) > 1:
                    raise UserError(
                        f"{self.setting}: {file.path}: column {name!r} stands {times} times; rename it"
                    )
                types.setdefault(name, []).append(file.schema.field(name).type)
        return pa.schema([(name, _unified(found, wanted.get(name))) for name, found in types.items()])

    def read(self, schema: pa.Schema, limit: int | None = None) -> "Dataset":
        """The rows of the files that `check` has looked at, with the columns of `schema`. Needs Ray."""
        import ray.data

        context = ray.data.DataContext.get_current()
        # The order of rows decides the order of batches and of answers: without this it varies.
        context.execution_options.preserve_order = True
        # A UserError in a worker arrives as one.
        context.raise_original_map_exception = True
        numbers = ray.data.range(len(self._opened), override_num_blocks=len(self._opened))
        kwargs = {"reader": self.reader(schema, limit)}
        rows = numbers.map_batches(_read, fn_kwargs=kwargs, batch_size=1, batch_format="pyarrow")
        return rows.limit(limit) if limit else rows

    def reader(self, schema: pa.Schema, limit: int | None = None) -> "Reader":
        """Reads the files that `check` has looked at, here or in a worker."""
        return Reader(self.filesystem, tuple(self._opened), schema, limit, self.setting)

    @property
    def format(self) -> str:
        return self.source.format

    def _has_rows(self, names: list[str]) -> bool:
        return any(b.num_rows for f in self._opened for b in formats.blocks(self.filesystem, f, names, 1))

    def _mixed(self, name: str, kind: Kind) -> list[str]:
        """What is wrong if files hold a column in types that do not mean the same."""
        first: tuple[str, File] | None = None
        for file in self._opened:
            have = file.schema.field(name).type
            family = _family(have, kind)
            if family is None:
                continue
            if first is None:
                first = family, file
            elif family != first[0]:
                before = first[1]
                return [
                    f"column {name!r} is {before.schema.field(name).type} in {before.path} and {have} in "
                    f"{file.path}; write it with one type in all files"
                ]
        return []


@contextmanager
def _of_setting(setting: str) -> Iterator[None]:
    """Put the setting that names the files before an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


@dataclass(frozen=True)
class Reader:
    """Reads files with one schema."""

    filesystem: pa.fs.FileSystem
    files: tuple[File, ...]
    schema: pa.Schema
    limit: int | None
    setting: str

    def blocks(self, file: File) -> Iterator[pa.Table]:
        """The rows of a file. Raises UserError if it cannot be read to its end."""
        names = [name for name in self.schema.names if name in file.schema.names]
        with _of_setting(self.setting):
            for block in formats.blocks(self.filesystem, file, names, self.limit):
                yield self._typed(block)

    def _typed(self, block: pa.Table) -> pa.Table:
        columns = []
        for field in self.schema:
            if field.name not in block.column_names:
                columns.append(pa.nulls(block.num_rows, field.type))
                continue
            column = block[field.name]
            if pa.types.is_dictionary(column.type) and column.type != field.type:
                column = column.cast(column.type.value_type)
            columns.append(column.cast(field.type, safe=False))
        return pa.table(columns, schema=self.schema)


def _read(numbers: pa.Table, reader: Reader) -> Iterator[pa.Table]:
    """For `map_batches` over the numbers of files."""
    for number in numbers["id"].to_pylist():
        yield from reader.blocks(reader.files[number])


def _schema_faults(file: File, wanted: Mapping[str, Kind]) -> list[str]:
    faults = []
    names = file.schema.names
    missing = [
        f"{'the label' if kind == 'label' else 'column'} {n!r}"
        for n, kind in wanted.items()
        if n not in names
    ]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        hint = "; is its first row a header?" if len(missing) == len(wanted) else ""
        faults.append(
            f"{', '.join(missing)} {verb} missing; the file has {', '.join(map(repr, names))}{hint}"
        )
    for name, kind in wanted.items():
        if name not in names:
            continue
        if names.count(name) > 1:
            faults.append(f"column {name!r} stands {names.count(name)} times")
        elif file.format == "parquet" and not _fits(file.schema.field(name).type, kind):
            have = file.schema.field(name).type
            faults.append(f"column {name!r} must hold {MUST_HOLD[kind]}, but its type is {have}")
    return faults


def _fits(have: pa.DataType, kind: Kind) -> bool:
    if pa.types.is_dictionary(have):
        have = have.value_type
    if pa.types.is_null(have):
        return True
    if kind == "number":
        return is_number(have)
    if kind == "time":
        is_plain = pa.types.is_integer(have) or pa.types.is_floating(have)
        return is_string(have) or is_plain or pa.types.is_timestamp(have) or pa.types.is_date(have)
    return is_string(have) or (kind == "label" and (pa.types.is_integer(have) or pa.types.is_boolean(have)))


def _family(have: pa.DataType, kind: Kind | None) -> str | None:
    """Types of one family mean the same as a column of this kind; None if the type says nothing."""
    if pa.types.is_dictionary(have):
        have = have.value_type
    if pa.types.is_null(have):
        return None
    if is_string(have):
        return "text"
    if kind == "number" and is_number(have):
        return "number"
    if pa.types.is_boolean(have):
        return "boolean"
    if pa.types.is_integer(have):
        return "number" if kind == "time" else "integer"
    if pa.types.is_floating(have):
        return "number"
    return "time" if kind == "time" else str(have)


def _unified(types: Sequence[pa.DataType], kind: Kind | None) -> pa.DataType:
    """The one type in which a column is read from all files; `kind` is None for one that is only carried."""
    if len(set(types)) == 1:
        return types[0]
    families = {family for have in types if (family := _family(have, kind))}
    if families == {"number"}:
        return pa.float64()
    if families == {"integer"} and kind is None:
        return pa.int64()
    return pa.timestamp("us") if families == {"time"} else pa.string()
