"""Reading checked files with one schema, in this process or in a worker."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs

from app.data.sources import formats
from app.data.sources.formats import File
from app.errors import UserError


@contextmanager
def prefix_errors(setting: str) -> Iterator[None]:
    """Prefix a UserError with the setting that names the files."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


@dataclass(frozen=True)
class Reader:
    """Reader of files, which casts their columns to one schema."""

    filesystem: pa.fs.FileSystem
    files: tuple[File, ...]
    schema: pa.Schema
    limit: int | None
    """Maximum number of rows per file."""
    setting: str

    def blocks(self, file: File) -> Iterator[pa.Table]:
        """The rows of a file. Raises UserError if it cannot be read to its end."""
        names = [name for name in self.schema.names if name in file.schema.names]
        with prefix_errors(self.setting):
            for block in formats.blocks(self.filesystem, file, names, self.limit):
                yield self._cast(block)

    def _cast(self, block: pa.Table) -> pa.Table:
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


def read_files(indices: pa.Table, reader: Reader) -> Iterator[pa.Table]:
    """The rows of the files with these indices, for `map_batches`."""
    for index in indices["id"].to_pylist():
        yield from reader.blocks(reader.files[index])
