"""Predictions for whole tables of files, on the CPUs of a cluster."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from app.bundle.bundle import Bundle
from app.bundle.schema import Schema
from app.cluster import capacity
from app.config import Source
from app.data.sources.column_types import Kind
from app.data.sources.files import Files
from app.data.sources.formats import SUFFIXES, has_format
from app.errors import UserError, unwrap_user_errors
from app.jobs.predictor import VIOLATION, Predictor, prediction_columns
from app.registry import versions
from app.state import shared, stages

if TYPE_CHECKING:
    from ray.data import Dataset

BATCH_ROWS = 1024
"""Number of rows that are predicted at once."""


@dataclass(frozen=True)
class PredictedTable:
    """Result of predicting a table."""

    num_rows: int
    num_invalid: int
    """Number of rows that violate the contract."""
    suffix: str
    """Suffix of the prediction columns, such as `_2`; empty unless the table has columns of their names."""


def folder(model: str | Path) -> Path:
    """The folder of a bundle.

    `model` is a registered version such as "income@champion" or "income@3", a model such as "income", whose
    champion is used, or the path of the folder. Raises UserError if there is no such version.
    """
    name, at, version = str(model).partition("@")
    if at:
        return versions.resolve(name, version).path
    return Path(model) if _is_folder(Path(model)) else versions.resolve(name, "champion").path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long or has a NUL
        return False


def source(name: str) -> Source:
    """The source of a file or folder, with the format that the suffixes of the file names determine.

    Raises UserError if no suffix is known, or if a folder has files of both formats.
    """
    formats: list[Literal["parquet", "csv"]] = ["parquet", "csv"]
    names = [file.name for file in Path(name).rglob("*")] if Path(name).is_dir() else [name]
    matching = [option for option in formats if any(has_format(file, option) for file in names)]
    if len(matching) > 1:
        raise UserError(f"--input: {name} has CSV and Parquet files; give a folder with one of them")
    if not matching and Path(name).suffix:
        suffixes = ", ".join(suffix for option in formats for suffix in SUFFIXES[option])
        raise UserError(f"--input: {name} must be a folder or a file whose name ends in {suffixes}")
    return Source(path=name, format=matching[0] if matching else "parquet")


def run(
    model: str,
    source: Source,
    output: Path,
    k: int = 10,
    on_wait: Callable[[str | None], None] = lambda _: None,
) -> PredictedTable:
    """Predict all rows of a file or folder, and write them to the new folder `output` as Parquet files. Needs
    Ray.

    `on_wait` is called with a message if too few CPUs are free, else with None. Raises UserError if there is
    no such model or input, a column is missing, a file cannot be read to its end, or `output` exists.
    """
    with unwrap_user_errors():
        return _run(model, source, output, k, on_wait)


def _run(
    model: str, source: Source, output: Path, k: int, on_wait: Callable[[str | None], None]
) -> PredictedTable:
    from ray.data.aggregate import Count

    output = output.absolute()
    if output.exists():
        raise UserError(f"--output: {output} must not exist; name another folder, or remove it")
    path = folder(model)
    shared.require_shared(output.parent)
    schema = Bundle(path).schema
    on_wait(capacity.current().wait_message(1, "predict"))
    rows, names = _read(source, schema)
    suffix = _free_suffix(schema, names)
    predicted = rows.map_batches(
        Predictor,
        fn_constructor_args=(path, k, suffix),
        batch_format="pyarrow",
        batch_size=BATCH_ROWS,
        **_actor_options(capacity.current().left_by_endpoints()),
    ).materialize()
    if not stages.place(output, lambda draft: _write(predicted, draft)):
        raise UserError(f"--output: {output} must not exist, but another command has just written it")
    violation = f"{VIOLATION}{suffix}"
    num_invalid = predicted.aggregate(Count(violation, ignore_nulls=True))[f"count({violation})"]
    return PredictedTable(predicted.count(), num_invalid, suffix)


def _read(source: Source, schema: Schema) -> tuple["Dataset", list[str]]:
    """The input with all its columns, and their names."""
    files = Files(source, "--input")
    inputs: dict[str, Kind] = {item.name: item.contract.type for item in schema.inputs}
    files.check(inputs)
    columns = files.all_columns(inputs)
    return files.read(columns), columns.names


def _free_suffix(schema: Schema, names: Sequence[str]) -> str:
    """The first of "", "_2", "_3" and so on that makes the prediction columns differ from all `names`."""
    suffixes = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    columns = prediction_columns(schema)
    return next(suffix for suffix in suffixes if not {f"{column}{suffix}" for column in columns} & {*names})


def _write(predicted: "Dataset", draft: Path) -> None:
    """Write the rows. Raises OSError if not all of them are in the files."""
    predicted.write_parquet(str(draft))
    num_written = sum(pq.read_metadata(file).num_rows for file in draft.glob("*.parquet"))
    if num_written != predicted.count():
        raise OSError(f"{num_written:,} of {predicted.count():,} rows were written to {draft}")


def _actor_options(num_free_cpus: float) -> dict[str, Any]:
    """The number of predicting actors and their CPUs, such that a CPU is left for the tasks of Ray Data that
    read the rows: actors that took it would wait for rows forever."""
    from ray.data import ActorPoolStrategy

    if num_free_cpus >= 2:
        return {"compute": ActorPoolStrategy(min_size=1, max_size=int(num_free_cpus))}
    share = math.floor(100 * (num_free_cpus - 1)) / 100
    return {"compute": ActorPoolStrategy(size=1), "num_cpus": share}
