"""Run the prepare stage without Ray: its own code, on a table in memory."""

import hashlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from app.config import Project
from app.data import prepare as stage
from app.data.prepare import Prepared
from app.data.sources import files


class Rows:
    """A stand-in for a Ray Dataset with one block: the methods that the stage uses."""

    def __init__(self, table: pa.Table):
        self.table = table

    def map_batches(self, function, fn_args=(), **_):
        return Rows(function(self.table, *fn_args))

    def materialize(self):
        return self

    def count(self) -> int:
        return self.table.num_rows

    def take_all(self) -> list[dict]:
        return self.table.to_pylist()

    def to_pandas(self) -> pd.DataFrame:
        return self.table.to_pandas()

    def write_parquet(self, folder: str) -> None:
        Path(folder).mkdir()
        pa.parquet.write_table(self.table, Path(folder) / "0.parquet")


def prepare(project: Project, table: pa.Table) -> Prepared:
    """Prepare a table as if it were the project's source."""
    version = hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read", lambda data: Rows(table.select(data.names)))
        patch.setattr(files, "version", lambda source: version)
        return stage.prepare(project)
