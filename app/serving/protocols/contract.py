"""What the rows of a request must hold, whatever its protocol. All violations are found at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from app.bundle.bundle import Ranking
from app.bundle.schema import Schema
from app.data.cells import told
from app.serving.http import MAX_LISTED_VIOLATIONS, Refused

MAX_UNIT_LENGTH = 256
"""Maximum length of a unit, in characters."""
UNIT_PATTERN = r"^[^\x00]+$"
"""PostgreSQL stores no text with a NUL."""
DEFAULT_NUM_ITEMS = 10
"""Items per user that a recommender returns if the request does not say."""
MAX_VIOLATIONS = 10_000
"""Above this, violations are counted but not listed: describing a million takes seconds and a gigabyte."""
ABSENT, GENERAL = object(), object()
"""Stand-ins for the value of a violation: ABSENT if none came, GENERAL if the rule says everything."""

Columns = Mapping[str, np.ndarray]
"""Columns by name, each (rows,)."""
Location = tuple[int | str, ...]
"""A place in a request, such as ("rows", 3, "age")."""
Violations = list[tuple[Location, str, Any]]
"""Place, broken rule and the value that came. Formatted only when they are listed."""


def dotted(place: Location) -> str:
    """A place as text, such as `rows.3.age`; `body` for the whole request."""
    return ".".join(str(part)[:MAX_UNIT_LENGTH] for part in place) or "body"


@dataclass(frozen=True)
class Query:
    """The content of a request that keeps the contract."""

    columns: dict[str, np.ndarray]
    """An array (rows,) for each input, as `Bundle.predict` takes them."""
    num_rows: int
    unit: str | None
    k: int | None = None
    """Items per user, of a recommender; None if the request does not say."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as read, with None for a missing value."""
        values = [array.tolist() for array in self.columns.values()]
        for column, array in zip(values, self.columns.values(), strict=True):
            if array.dtype == np.float64:
                column[:] = [None if value != value else value for value in column]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The prediction of one variant, before it is encoded for a protocol."""

    model: str
    variant: str
    version: str
    request_id: str
    probabilities: np.ndarray | None = None
    """float32 (rows,), or (rows, classes)"""
    ranking: Ranking | None = None
    """A recommender's answer, instead of probabilities."""


class Contract:
    """The bundle's schema, prepared to check and convert the rows of requests."""

    def __init__(self, schema: Schema, max_rows: int):
        self.schema = schema
        self.max_rows = max_rows
        self._cells = schema.cells()
        self.columns = self._cells.keys()
        """Names of the input columns."""
        self.optional_columns = {item.name for item in schema.inputs if item.contract.nullable}
        """Names of the columns that a row may leave out."""
        self.takes_k = schema.task == "ranking"
        """Whether a request may say how many items it wants per user."""

    def check(
        self,
        columns: Mapping[str, Sequence[Any]],
        num_rows: int,
        unit: Any,
        k: Any,
        other_violations: Sequence[tuple[Location, str, Any]] = (),
        path: Callable[[Location], str] = dotted,
    ) -> Query:
        """Check and convert columns of any protocol; a nullable column may be left out.

        Raises Refused with every violation, those in `other_violations` included; `path` formats places.
        """
        violations: Violations = []
        arrays = {}
        if columns or not other_violations:
            for name, cells in self._cells.items():
                values = columns.get(name)
                arrays[name], broken = cells.read_all([None] * num_rows if values is None else values)
                for row, rule in broken.items():
                    assert values is not None
                    violations.append((("rows", row, name), rule, values[row]))
        violations += other_violations
        if unit is not None and not _is_unit(unit):
            rule = f"must be a text of 1 to {MAX_UNIT_LENGTH} characters without NUL"
            violations.append((("unit",), rule, unit))
        if k is not None and self.takes_k and not (type(k) is int and 1 <= k <= self.schema.num_items):
            violations.append((("k",), f"must be an integer from 1 to {self.schema.num_items}", k))
        if violations:
            raise refused(violations, path)
        return Query(arrays, num_rows, unit, k)

    def require_num_rows(self, num_rows: int) -> None:
        """Raise Refused with 413 if there are too many."""
        if num_rows > self.max_rows:
            raise Refused(
                413,
                "too many rows in one request; send several requests",
                [{"path": "rows", "message": f"must have at most {self.max_rows} rows, not {num_rows}"}],
            )


def refused(violations: Violations, path: Callable[[Location], str] = dotted) -> Refused:
    """A refusal with 422 that lists violations by row, in whatever order they were found."""

    def row(violation: tuple[Location, str, Any]) -> float:
        match violation[0]:
            case ("rows", int(number), *_):
                return number
        return math.inf

    # Violations of the request as a whole come last.
    listed = sorted(violations, key=row)[:MAX_LISTED_VIOLATIONS]
    messages = [{"path": path(place), "message": _message(rule, value)} for place, rule, value in listed]
    return Refused(422, f"the request breaks the contract in {len(violations)} places", messages)


def _message(rule: str, value: Any) -> str:
    if value is GENERAL:
        return rule
    return "must be given" if value is ABSENT else told(rule, value)


def _is_unit(unit: Any) -> bool:
    return type(unit) is str and 1 <= len(unit) <= MAX_UNIT_LENGTH and "\0" not in unit


def refusal(error: ValidationError) -> Refused:
    """The refusal of a body that pydantic cannot validate: 400 if it is not JSON, else 422."""
    if (count := error.error_count()) > MAX_VIOLATIONS:
        return Refused(422, f"the request breaks the contract in {count} places, too many to list")
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return Refused(400, f"the body must be JSON: {errors[0]['ctx']['error']}")
    violations = [{"path": dotted(e["loc"]), "message": e["msg"]} for e in errors[:MAX_LISTED_VIOLATIONS]]
    return Refused(422, f"the request breaks the contract in {len(errors)} places", violations)
