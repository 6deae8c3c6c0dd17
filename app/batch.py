"""Predictions for whole tables: the bundle, contract and answers of an endpoint, on a cluster's CPUs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from app import capacity, registry, store
from app.bundle import Bundle, Schema, columns_of
from app.config import Source
from app.data.sources import Files
from app.errors import UserError
from app.serving.protocol import Contract, Refused

if TYPE_CHECKING:
    from ray.data import Dataset

VIOLATION = "violation"
"""The column that says why a row has no answer."""
ROWS_AT_ONCE = 1024


def folder(model: str | Path) -> Path:
    """The bundle of a registered version, such as "income@champion" or "income@3", or the folder of one."""
    name, at, version = str(model).partition("@")
    if at:
        return registry.resolve(name, version).path
    return Path(model) if _is_folder(Path(model)) else registry.resolve(name, "champion").path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, or one that no file can have
        return False


def source(name: str) -> Source:
    """A file or folder; CSV if its name, or that of a file in it, says so."""
    is_csv = name.endswith(".csv") or (Path(name).is_dir() and any(Path(name).glob("*.csv")))
    return Source(path=name, format="csv" if is_csv else "parquet")


def predict(bundle: Bundle, rows: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """A model's answers, a row for each of `rows` with their index; values are as training had them.

    The columns are `probability` of a binary label; `label` and the probability of each class of several;
    `items` and `scores`, the best `k`, of a recommender. Raises UserError for a column that is missing.
    """
    schema = bundle.schema
    _require_columns(schema, list(rows.columns), "rows")
    columns = {}
    for item in schema.inputs:
        number = item.contract.type == "number"
        series = rows[item.name]
        columns[item.name] = series.to_numpy(np.float64) if number else _strings(series)
    return _answers(bundle, columns, k).set_index(rows.index)


class Predictor:
    """Answers blocks of a table on a worker."""

    def __init__(self, path: Path, k: int):
        self._bundle = Bundle(path)
        self._contract = Contract(self._bundle.schema, ROWS_AT_ONCE)
        self._k = k

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block with its answers. A row that breaks the contract gets none, and VIOLATION says why."""
        rows = _rows(block, self._bundle.schema)
        violations = self._violations(rows)
        kept = [row for row, violation in zip(rows, violations, strict=True) if violation is None]
        answers = _answers(self._bundle, columns_of(self._bundle.schema, kept), self._k)
        answers.index = pd.Index([n for n, violation in enumerate(violations) if violation is None])
        answers = answers.reindex(range(len(rows)))
        for name in answers.columns:
            block = block.append_column(name, pa.Array.from_pandas(answers[name], type=self._type(name)))
        return block.append_column(VIOLATION, pa.array(violations, pa.string()))

    def _violations(self, rows: list[dict[str, Any]]) -> list[str | None]:
        if not rows or self._violation(rows) is None:
            return [None] * len(rows)
        return [self._violation([row]) for row in rows]

    def _violation(self, rows: list[dict[str, Any]]) -> str | None:
        try:
            self._contract.check(rows, None, None, lambda place: str(place[-1]))
        except Refused as refused:
            return "; ".join(f"{v['path']}: {v['message']}" for v in refused.violations) or str(refused)
        return None

    def _type(self, name: str) -> pa.DataType:
        """Of an answer's column: the same in each block, also in one that has no answer at all."""
        if name == "items":
            return pa.list_(pa.string())
        if name == "scores":
            return pa.list_(pa.float32())
        return {"label": pa.string(), "known": pa.bool_()}.get(name, pa.float32())


def run(
    model: str,
    source: Source,
    output: Path,
    k: int = 10,
    on_wait: Callable[[str | None], None] = lambda _: None,
) -> tuple[int, int]:
    """Answer all rows of a file or folder; `output` becomes a folder of Parquet files. Needs Ray.

    `on_wait` hears what is waited for, if anything is.

    :returns: how many rows there were, and how many of them broke the contract.
    :raises UserError: there is no such model or input, a column is missing, or `output` is there already.
    """
    from ray.data import DataContext
    from ray.data.aggregate import Count

    output = output.absolute()
    if output.exists():
        raise UserError(f"--output: {output} is there already; name a folder that is not, or remove it")
    store.require_shared(output.parent)
    path = folder(model)
    bundle = Bundle(path)
    on_wait(capacity.now().wait(1, "predict"))
    rows = _read(source, bundle.schema)
    # Answers stand in the order of their rows.
    DataContext.get_current().execution_options.preserve_order = True
    answered = rows.map_batches(
        Predictor,
        fn_constructor_args=(path, k),
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        **_actors(capacity.now().room()),
    ).materialize()
    if not store.place(output, lambda draft: _write(answered, draft)):
        raise UserError(f"--output: {output} was made by another command meanwhile")
    return answered.count(), answered.aggregate(Count(VIOLATION, ignore_nulls=True))[f"count({VIOLATION})"]


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


def _read(source: Source, schema: Schema) -> "Dataset":
    import ray.data

    files = Files(source, "--input")
    if source.format == "csv":
        # As text: `007` is a category's value, and which cell is no number is the contract's affair.
        text = pa.csv.ConvertOptions(
            column_types={item.name: pa.string() for item in schema.inputs}, strings_can_be_null=True
        )
        rows = ray.data.read_csv(files.paths, filesystem=files.filesystem, convert_options=text)
    else:
        rows = ray.data.read_parquet(files.paths, filesystem=files.filesystem)
    _require_columns(schema, rows.columns() or [], files.name)
    return rows


def _require_columns(schema: Schema, names: Sequence[str], where: str) -> None:
    if missing := [item.name for item in schema.inputs if item.name not in names]:
        raise UserError(f"{where}: must have the columns {', '.join(missing)}")


def _rows(block: pa.Table, schema: Schema) -> list[dict[str, Any]]:
    """What a client would send of each row."""
    columns = {}
    for item in schema.inputs:
        values = block.column(item.name).to_pylist()
        number = item.contract.type == "number"
        columns[item.name] = [_number(value) if number else value for value in values]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _number(value: Any) -> Any:
    """A CSV cell as a number if it is one; NaN is missing, as in training."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return None if value != value else value


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


def _strings(series: pd.Series) -> np.ndarray:
    return series.astype(object).where(series.notna(), None).to_numpy()


def _lists(matrix: np.ndarray, k: int) -> Sequence[list]:
    return [row[:k].tolist() for row in matrix]
