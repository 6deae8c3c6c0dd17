"""Predictions for whole tables: the bundle, contract and answers of an endpoint, on a cluster's CPUs."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from app.bundle.bundle import OUTPUT, Bundle
from app.bundle.schema import Schema
from app.cluster import capacity
from app.config import Source
from app.data.arrow import is_string
from app.data.cells.rules import faults_by_row, with_value
from app.data.sources.files import Files, Kind
from app.data.sources.formats import SUFFIXES, has_format
from app.errors import UserError, unwrap_user_errors
from app.registry import versions
from app.state import shared, stages

if TYPE_CHECKING:
    from ray.data import Dataset

VIOLATION = "violation"
"""The column that says why a row has no answer."""
ROWS_AT_ONCE = 1024
NUM_EXAMPLES = 3
"""Number of broken rows that an error shows."""


def folder(model: str | Path) -> Path:
    """The bundle of a registered version, such as "income@champion" or "income@3", or the folder of one."""
    name, at, version = str(model).partition("@")
    if at:
        return versions.resolve(name, version).path
    return Path(model) if _is_folder(Path(model)) else versions.resolve(name, "champion").path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, or one that no file can have
        return False


def source(name: str) -> Source:
    """A file or folder, of the format that its name, or those of the files in it, says.

    Raises UserError if that is none or several.
    """
    formats: list[Literal["parquet", "csv"]] = ["parquet", "csv"]
    names = [name]
    if Path(name).is_dir():
        names = [file.name for file in Path(name).rglob("*")]
    found = [each for each in formats if any(has_format(file, each) for file in names)]
    if len(found) > 1:
        raise UserError(f"--input: {name} has CSV and Parquet files; give a folder with one of them")
    if not found and Path(name).suffix:
        allowed = ", ".join(suffix for each in formats for suffix in SUFFIXES[each])
        raise UserError(f"--input: {name} must be a folder or a file whose name ends in {allowed}")
    return Source(path=name, format=found[0] if found else "parquet")


def predict(bundle: Bundle, rows: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """A model's answers, a row for each of `rows` with their index.

    The columns are `probability` of a binary label; `label` and the probability of each class of several;
    `items` and `scores`, the best `k`, of a recommender. Raises UserError for a column that is missing,
    and for rows that break the contract.
    """
    schema = bundle.schema
    _require_columns(schema, list(rows.columns), "rows")
    read = {name: cells.read_series(rows[name]) for name, cells in schema.cells().items()}
    broken = [
        f"  row {rows.index[row]!r}: {_said(rows.iloc[row], rules)}"
        for row, rules in enumerate(
            faults_by_row({name: faults for name, (_, faults) in read.items()}, len(rows))
        )
        if rules
    ]
    if broken:
        more = f"\n  and {len(broken) - NUM_EXAMPLES:,} more" if len(broken) > NUM_EXAMPLES else ""
        raise UserError(
            f"{len(broken):,} of {len(rows):,} rows break the contract of {schema.name}; mend them or leave "
            "them out:\n" + "\n".join(broken[:NUM_EXAMPLES]) + more
        )
    return _answers(bundle, {name: values for name, (values, _) in read.items()}, k).set_index(rows.index)


class Predictor:
    """Answers blocks of a table on a worker."""

    def __init__(self, path: Path, k: int, suffix: str = ""):
        """`suffix` ends the names of the answers' columns."""
        self._suffix = suffix
        self._bundle = Bundle(path)
        self._cells = self._bundle.schema.cells()
        self._k = k

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block with its answers. A row that breaks the contract gets none, and VIOLATION says why."""
        read = {
            name: cells.read_column(block.column(name), parse_text=True)
            for name, cells in self._cells.items()
        }
        faults = faults_by_row({name: found for name, (_, found) in read.items()}, block.num_rows)
        violations = [self._violation(block, row, rules) for row, rules in enumerate(faults)]
        kept = np.flatnonzero([violation is None for violation in violations])
        answers = _answers(self._bundle, {name: values[kept] for name, (values, _) in read.items()}, self._k)
        answers.index = pd.Index(kept)
        answers = answers.reindex(range(block.num_rows))
        for name, (values, _) in read.items():
            if values.dtype == np.float64 and is_string(block.column(name).type):
                # Numbers of CSV are written as numbers, so that the output is a table for `predict` again.
                numbers = pa.array(values, from_pandas=True)
                block = block.set_column(block.column_names.index(name), name, numbers)
        for name in answers.columns:
            answer = pa.Array.from_pandas(answers[name], type=self._type(name))
            block = block.append_column(f"{name}{self._suffix}", answer)
        return block.append_column(f"{VIOLATION}{self._suffix}", pa.array(violations, pa.string()))

    def _violation(self, block: pa.Table, row: int, rules: list[tuple[str, str]]) -> str | None:
        return _said({name: block.column(name)[row].as_py() for name, _ in rules}, rules) if rules else None

    def _type(self, name: str) -> pa.DataType:
        """Of an answer's column: the same in each block, also in one that has no answer at all."""
        if name == "items":
            return pa.list_(pa.string())
        if name == "scores":
            return pa.list_(pa.float32())
        return {"label": pa.string(), "known": pa.bool_()}.get(name, pa.float32())


@dataclass(frozen=True)
class Answered:
    """A table with its answers."""

    num_rows: int
    num_broken: int
    """Rows that break the contract."""
    suffix: str
    """Suffix of the answer columns, such as `_2`; empty unless the table has columns of their names."""


def run(
    model: str,
    source: Source,
    output: Path,
    k: int = 10,
    on_wait: Callable[[str | None], None] = lambda _: None,
) -> Answered:
    """Answer all rows of a file or folder; `output` becomes a folder of Parquet files. Needs Ray.

    `on_wait` hears what is waited for, if anything is. Raises UserError if there is no such model or input, a
    column is missing, a file cannot be read to its end, or `output` is there already.
    """
    with unwrap_user_errors():
        return _run(model, source, output, k, on_wait)


def _run(model: str, source: Source, output: Path, k: int, on_wait: Callable[[str | None], None]) -> Answered:
    from ray.data.aggregate import Count

    output = output.absolute()
    if output.exists():
        raise UserError(f"--output: {output} is there already; name a folder that is not, or remove it")
    path = folder(model)
    shared.require_shared(output.parent)
    bundle = Bundle(path)
    on_wait(capacity.current().wait_message(1, "predict"))
    rows, names = _read(source, bundle.schema)
    suffix = _suffix(bundle.schema, names)
    answered = rows.map_batches(
        Predictor,
        fn_constructor_args=(path, k, suffix),
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        **_actors(capacity.current().left_by_endpoints()),
    ).materialize()
    if not stages.place(output, lambda draft: _write(answered, draft)):
        raise UserError(f"--output: {output} was made by another command meanwhile")
    violation = f"{VIOLATION}{suffix}"
    broken = answered.aggregate(Count(violation, ignore_nulls=True))[f"count({violation})"]
    return Answered(answered.count(), broken, suffix)


def _suffix(schema: Schema, names: Sequence[str]) -> str:
    """The first of "", "_2", "_3" and so on with which no answer column has the name of a table column."""
    answers = {"ranking": ["items", "scores"], "binary": [OUTPUT]}.get(
        schema.task, ["label", *schema.classes]
    )
    suffixes = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    return next(s for s in suffixes if not {f"{answer}{s}" for answer in [*answers, VIOLATION]} & {*names})


def _write(answered: "Dataset", draft: Path) -> None:
    """Write a row for each row, and no other."""
    answered.write_parquet(str(draft))
    written = sum(pq.read_metadata(file).num_rows for file in draft.glob("*.parquet"))
    if written != answered.count():
        raise OSError(f"{written:,} of {answered.count():,} rows were written to {draft}")


def _actors(room: float) -> dict[str, Any]:
    """How many actors answer, and what each claims, so that Ray Data's own tasks have a CPU as well: they
    read the rows, and actors that claimed it would wait for rows for ever."""
    from ray.data import ActorPoolStrategy

    if room >= 2:
        return {"compute": ActorPoolStrategy(min_size=1, max_size=int(room))}
    share = math.floor(100 * (room - 1)) / 100
    return {"compute": ActorPoolStrategy(size=1), "num_cpus": share}


def _read(source: Source, schema: Schema) -> tuple["Dataset", list[str]]:
    """The input with all its columns, and their names."""
    files = Files(source, "--input")
    wanted: dict[str, Kind] = {item.name: item.contract.type for item in schema.inputs}
    files.check(wanted)
    carried = files.all_columns(wanted)
    return files.read(carried), carried.names


def _require_columns(schema: Schema, names: Sequence[str], where: str) -> None:
    if missing := [item.name for item in schema.inputs if item.name not in names]:
        raise UserError(f"{where}: must have the columns {', '.join(missing)}")


def _said(row: Mapping[str, Any], rules: list[tuple[str, str]]) -> str:
    """What is wrong with a row: its broken rules with the values that came."""
    return "; ".join(f"{name}: {with_value(rule, row[name])}" for name, rule in rules)


def _answers(bundle: Bundle, columns: dict[str, np.ndarray], k: int) -> pd.DataFrame:
    schema = bundle.schema
    if schema.task == "ranking":
        ranking = bundle.rank(columns)
        return pd.DataFrame({"items": _lists(ranking.items, k), "scores": _lists(ranking.scores, k)})
    probabilities = bundle.predict(columns)
    if schema.task == "binary":
        return pd.DataFrame({"probability": probabilities})
    table = pd.DataFrame(probabilities, columns=schema.classes)
    table.insert(0, "label", np.array(schema.classes)[probabilities.argmax(axis=1)])
    return table


def _lists(matrix: np.ndarray, k: int) -> Sequence[list]:
    return [row[:k].tolist() for row in matrix]
