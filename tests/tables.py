"""Small tables as users have them: TRAINED can be trained on, REFUSED have the text of the refusal.

The keys of these dicts describe the tables. All tables have the same contract: AGE, a number that may be
missing, TOWN, a category that may be missing, and the label BOUGHT, which is yes or no.
`python -m tests.tables FOLDER` writes all of them.
"""

import gzip
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from app.config import Data
from app.data import contract
from app.data.cells.numbers import NUMBER_PATTERN
from app.data.sources.files import Files, kinds

AGE, TOWN, BOUGHT = "age", "town", "bought"
NUM_ROWS = 120
TOWNS = ["Bonn", "Köln", "Aachen, Stadt", 'the "old" town']


def ages() -> list[float]:
    return [18 + (number * 7) % 60 for number in range(NUM_ROWS)]


def towns() -> list[str]:
    """Distinct towns, so that rows are distinct: equal rows are in the same part of a split."""
    return [f"{TOWNS[number % 4]} {number}" for number in range(NUM_ROWS)]


def bought() -> list[str]:
    return ["yes" if number % 3 else "no" for number in range(NUM_ROWS)]


def columns(**changed: list[Any]) -> dict[str, list[Any]]:
    return {AGE: ages(), TOWN: towns(), BOUGHT: bought(), **changed}


def replace_some(values: list[Any], *others: Any) -> list[Any]:
    """Replace every seventh of the values by one of `others`, in turn."""
    return [others[n // 7 % len(others)] if n % 7 == 3 else value for n, value in enumerate(values)]


def csv(
    table: Mapping[str, list[Any]] | None = None, separator: str = ",", end: str = "\n", quote: bool = True
) -> str:
    """The table as CSV; None is an empty cell."""

    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        is_quoted = quote and any(mark in text for mark in (separator, '"', "\n"))
        return '"' + text.replace('"', '""') + '"' if is_quoted else text

    table = columns() if table is None else table
    lines = [list(table), *zip(*table.values(), strict=True)]
    return "".join(separator.join(cell(value) for value in line) + end for line in lines)


def parquet(**changed: Any) -> bytes:
    """The table as Parquet; values may be Arrow arrays."""
    sink = io.BytesIO()
    pa.parquet.write_table(pa.table(columns(**changed)), sink)
    return sink.getvalue()


@dataclass(frozen=True)
class Table:
    """A table in one or several files."""

    files: dict[str, bytes]
    """Contents of the files by their names."""
    refusal: str = ""
    """Text of the refusal; empty if the table can be trained on."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of `data` that differ from the default: `missing`, `label`, `columns` (both names)."""

    @property
    def format(self) -> str:
        return "parquet" if next(iter(self.files)).endswith(".parquet") else "csv"

    def write(self, folder: Path) -> Path:
        """Write the files. Returns the file, or the folder if there are several."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder / name if len(self.files) == 1 else folder

    def data(self, path: Path) -> dict[str, Any]:
        """The section `data` of a project file."""
        age, town = self.settings.get("columns", (AGE, TOWN))
        return {
            "source": {"path": str(path), "format": self.format},
            "label": self.settings.get("label", {"column": BOUGHT, "positive": "yes"}),
            "missing": self.settings.get("missing", []),
            "columns": {
                age: {"type": "number", "nullable": True},
                town: {"type": "category", "nullable": True, "unseen": "ignore"},
            },
        }


def text(name: str, content: str, refusal: str = "", encoding: str = "utf-8", **settings: Any) -> Table:
    return Table({name: content.encode(encoding)}, refusal, settings)


def parquet_file(refusal: str = "", *, settings: dict[str, Any] | None = None, **changed: Any) -> Table:
    return Table({"rows.parquet": parquet(**changed)}, refusal, settings or {})


def two_parquet_files(first: dict[str, Any], second: dict[str, Any], refusal: str = "") -> Table:
    return Table({"a.parquet": parquet(**first), "b.parquet": parquet(**second)}, refusal)


def _trained() -> dict[str, Table]:
    integers = pa.array([int(age) for age in ages()])
    halves = pa.array([None if n % 5 == 0 else age for n, age in enumerate(ages())], pa.float32())
    names = {"/low": ages(), "größe.cm\n(1)": towns(), BOUGHT: bought()}
    return {
        "plain": text("rows.csv", csv()),
        "byte order mark and CRLF": text("rows.csv", csv(end="\r\n"), encoding="utf-8-sig"),
        "carriage returns": text("rows.csv", csv(end="\r")),
        "semicolons": text("rows.csv", csv(separator=";")),
        "bars": text("rows.csv", csv(separator="|")),
        "tabs": text("rows.tsv", csv(separator="\t")),
        "capitals": text("ROWS.CSV", csv()),
        "gzip": Table({"rows.csv.gz": gzip.compress(csv().encode())}),
        "blank lines": text("rows.csv", csv().replace("\n", "\n\n")),
        "trailing separators": text("rows.csv", csv(end=",\n")),
        "no newline at the end": text("rows.csv", csv().rstrip("\n")),
        "newlines in quotes": text("rows.csv", csv(columns(town=replace_some(towns(), "Bad\nEms")))),
        "inches": text(
            "rows.csv",
            csv(columns(pipe=['5" pipe'] * NUM_ROWS), quote=False).replace("Aachen, Stadt", "Aachen"),
        ),
        "index of pandas": text("rows.csv", csv({"": list(range(NUM_ROWS)), **columns()})),
        "NA of R": text("rows.csv", csv(columns(age=replace_some(ages(), "NA")))),
        "NaN of pandas": text("rows.csv", csv(columns(age=replace_some(ages(), "NaN", None, "nan")))),
        "towns called NA and null": text(
            "rows.csv", csv(columns(town=replace_some(towns(), "NA", "nan", "null", "None")))
        ),
        "question marks": text(
            "rows.csv",
            csv(columns(age=replace_some(ages(), "?"), town=replace_some(towns(), "?"))),
            missing=["?"],
        ),
        "a number that stands for missing": text(
            "rows.csv", csv(columns(age=replace_some(ages(), -9, "-9.0"))), missing=["-9"]
        ),
        "a number that stands for missing, in Parquet": parquet_file(
            age=replace_some(ages(), -9.0), settings={"missing": ["-9"]}
        ),
        "leading zeros": text("rows.csv", csv(columns(town=replace_some(towns(), "007", "7", "01234")))),
        "spaces around numbers": text("rows.csv", csv(columns(age=[f" {age} " for age in ages()]))),
        "numbers as programs write them": text(
            "rows.csv", csv(columns(age=replace_some(ages(), "+5", ".5", "5.", "1e1", "1E+02")))
        ),
        "latin-1 in an unused column": text(
            "rows.csv", csv(columns(note=["café"] * NUM_ROWS)).replace("Köln", "Koeln"), encoding="latin-1"
        ),
        "files with separators and an order of their own": Table(
            {
                "a.csv": csv().encode(),
                "b.TSV": csv(dict(reversed(columns().items())), separator="\t").encode(),
            }
        ),
        "answers of another model": text(
            "rows.csv", csv(columns(probability=[0.5] * NUM_ROWS, violation=[None] * NUM_ROWS))
        ),
        "whole numbers": parquet_file(age=integers, town=pa.array(towns()).dictionary_encode()),
        "booleans for numbers": parquet_file(age=[n % 5 > 1 for n in range(NUM_ROWS)]),
        "decimals": parquet_file(age=[Decimal(age) / 4 for age in ages()]),
        "nothing but nulls": parquet_file(town=pa.nulls(NUM_ROWS)),
        "NaN and null": parquet_file(
            age=replace_some([float(age) for age in ages()], float("nan"), None),
            town=replace_some(towns(), "", None),
        ),
        "a label of integers": parquet_file(
            bought=[n % 3 // 2 for n in range(NUM_ROWS)],
            settings={"label": {"column": BOUGHT, "positive": "1"}},
        ),
        "awkward names": text("rows.csv", csv(names), columns=("/low", "größe.cm\n(1)")),
        "dictionary in one file, strings in the other": two_parquet_files(
            {"town": pa.array(towns()).dictionary_encode()}, {"town": pa.array(towns(), pa.large_string())}
        ),
        "integers in one file, floats in the other": two_parquet_files({"age": integers}, {"age": halves}),
        "booleans in one file, integers in the other": two_parquet_files(
            {"age": [n % 2 == 0 for n in range(NUM_ROWS)]}, {"age": integers}
        ),
        "another column of other types": two_parquet_files(
            {"id": integers}, {"id": [str(n) for n in range(NUM_ROWS)]}
        ),
        "only nulls in one file, towns in the other": two_parquet_files({"town": pa.nulls(NUM_ROWS)}, {}),
    }


def _refused() -> dict[str, Table]:
    lines = csv().splitlines(keepends=True)
    whole = parquet()
    number = "age: must be a number: "
    return {
        "latin-1": text("rows.csv", csv(), "row 3: is not UTF-8; save the file as UTF-8", "latin-1"),
        "UTF-16": text("rows.csv", csv(), "it is UTF-16; save it as UTF-8", "utf-16"),
        "a spreadsheet": Table({"rows.csv": b"PK\3\4\0\0\0\0" * 9}, "it is binary"),
        "ragged": text("rows.csv", csv() + "1,Bonn\n", "row 122: has 2 cells, the header 3"),
        "separators not quoted": text(
            "rows.csv", csv(quote=False), "row 4: has 4 cells, the header 3 (separator ','); quote"
        ),
        "a quote not closed": text(
            "rows.csv",
            csv(columns(town=["Bonn"] * NUM_ROWS)).replace("39,Bonn", '39,"Bonn', 1),
            "row 5: has 2 cells, the header 3 (separator ','); is a quote (\") not closed?",
        ),
        "a quote not closed in the last column": text(
            "rows.csv",
            csv(columns(town=["Bonn"] * NUM_ROWS)).replace(",no\n", ',"no\n', 1),
            'line 2: opens a quote (") that is never closed',
        ),
        "empty": text("rows.csv", "", "empty (0 bytes); give a csv file with rows"),
        "no rows": text("rows.csv", lines[0], "has columns but no rows"),
        "no header": text(
            "rows.csv",
            "".join(lines[1:]),
            "are missing; the file has '18', 'Bonn 0', 'no'; is its first row a header?",
        ),
        "spaces in the header": text(
            "rows.csv",
            csv().replace(",town,", ", town,", 1),
            "column 'town' is missing; the file has 'age', ' town'",
        ),
        "a column twice": text(
            "rows.csv",
            csv(columns(old=ages())).replace("old", "age", 1),
            "column 'age' must occur once, but it occurs 2 times",
        ),
        "decimal commas": text(
            "rows.csv",
            csv(columns(age=[f"{age},5" for age in ages()]), separator=";"),
            f"{number}120 of 120 rows, such as '18,5'",
        ),
        "underscores": text(
            "rows.csv",
            csv(columns(age=replace_some(ages(), "18_0"))),
            f"{number}17 of 120 rows, such as '18_0'",
        ),
        "NULL of SQL": text(
            "rows.csv",
            csv(columns(age=replace_some(ages(), "NULL"))),
            f"{number}17 of 120 rows, such as 'NULL'",
        ),
        "beyond every number": text(
            "rows.csv",
            csv(columns(age=replace_some(ages(), "1.797e308"))),
            "age: must be between -1e+100 and 1e+100: 17",
        ),
        "infinite": parquet_file(
            "age: must be finite: 17 of 120 rows, such as inf",
            age=replace_some([float(age) for age in ages()], float("inf")),
        ),
        "numbers as text": parquet_file(
            "column 'age' must hold numbers, but its type is string", age=[str(age) for age in ages()]
        ),
        "lists": parquet_file(
            "column 'age' must hold numbers, but its type is list", age=[[age] for age in ages()]
        ),
        "towns as numbers": parquet_file(
            "column 'town' must hold strings, but its type is int64", town=list(range(NUM_ROWS))
        ),
        "a label of several types": two_parquet_files(
            {"bought": [n % 2 for n in range(NUM_ROWS)]},
            {"bought": [n % 2 == 0 for n in range(NUM_ROWS)]},
            "must have one type in all files",
        ),
        "truncated": Table({"rows.parquet": whole[:-40]}, "must be a parquet file, but it"),
        "CSV under another name": Table({"rows.parquet": csv().encode()}, "must be a parquet file, but it"),
    }


def read(table: Table, folder: Path) -> tuple[Data, pa.Table, pd.DataFrame]:
    """The contract, the rows as stored in the files, and as training reads them; without Ray."""
    data = Data.model_validate(table.data(table.write(folder)))
    files = Files(data.source)
    columns = kinds(data)
    types = files.check(columns)
    reader = files.reader(pa.schema([(name, types[name]) for name in columns]))
    rows = pa.concat_tables(block for file in reader.files for block in reader.blocks(file))
    contract.require_no_violations(contract.violation_table(rows, data).to_pylist(), rows.num_rows)
    return data, rows, contract.conform(rows, data)[0]


def requested(data: Data, rows: pa.Table) -> dict[str, list[Any]]:
    """The columns of a request: numbers as numbers, all other values as in the file."""

    def number(value: Any) -> Any:
        if isinstance(value, str):
            return float(value) if NUMBER_PATTERN.fullmatch(value.strip()) else value
        return value if value is None or isinstance(value, bool) else float(value)

    values = {name: rows[name].to_pylist() for name in data.columns}
    return {
        name: [number(value) for value in column] if data.columns[name].type == "number" else column
        for name, column in values.items()
    }


TRAINED = _trained()
REFUSED = _refused()


if __name__ == "__main__":
    for name, table in {**TRAINED, **REFUSED}.items():
        print(table.write(Path(sys.argv[1]) / name.replace(" ", "_")))
