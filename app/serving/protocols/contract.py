"""Validation of requests against the data contract of a bundle, for all protocols.

A refusal lists all violations of a request at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from app.bundle.bundle import Ranking
from app.bundle.schema import Schema
from app.data.cells.rules import with_value
from app.serving.http import MAX_LISTED_VIOLATIONS, Refused

MAX_UNIT_LENGTH = 256
"""Maximum length of a unit, in characters."""
UNIT_PATTERN = r"^[^\x00]+$"
"""Pattern of a unit. It excludes NUL, which PostgreSQL cannot store in a text."""
DEFAULT_NUM_ITEMS = 10
"""Items per user that a recommender returns by default."""
MAX_VIOLATIONS = 10_000
"""Maximum number of violations that are formatted; a million would take seconds and a gigabyte of memory."""
ABSENT, GENERAL = object(), object()
"""Markers in place of the value of a violation: ABSENT if the request has no value, GENERAL if the message
needs none."""

Columns = Mapping[str, np.ndarray]
"""Columns by name; every array has the shape (rows,)."""
Location = tuple[int | str, ...]
"""Location in a request, such as ("rows", 3, "age")."""


class Violation(NamedTuple):
    """A violated rule of the contract. It is formatted only when it is listed."""

    location: Location
    rule: str
    """The rule as text, such as "must be a number"."""
    value: Any
    """Value in the request, or one of the markers ABSENT and GENERAL."""


def dotted(location: Location) -> str:
    """A location as text, such as `rows.3.age`; `body` for the whole request."""
    return ".".join(str(part)[:MAX_UNIT_LENGTH] for part in location) or "body"


@dataclass(frozen=True)
class Query:
    """The content of a request that satisfies the contract."""

    columns: dict[str, np.ndarray]
    """Values of every input, as `Bundle.predict` takes them: arrays of the shape (rows,)."""
    num_rows: int
    unit: str | None
    """Unit that the variant is chosen by; None if the request has none."""
    k: int | None = None
    """Items per user, of a recommender; None for the default."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows as they are recorded, with None for a missing value."""
        values = [array.tolist() for array in self.columns.values()]
        for column, array in zip(values, self.columns.values(), strict=True):
            if array.dtype == np.float64:
                column[:] = [None if value != value else value for value in column]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The prediction of a variant, before it is encoded for a protocol."""

    model: str
    variant: str
    version: str
    request_id: str
    probabilities: np.ndarray | None = None
    """Probabilities, float32 of shape (rows,) or (rows, classes); None for a recommender."""
    ranking: Ranking | None = None
    """Recommended items; None for any other model."""


class Contract:
    """The data contract of a bundle, prepared to validate and convert requests."""

    def __init__(self, schema: Schema, max_rows: int):
        self.schema = schema
        self.max_rows = max_rows
        self._cells = schema.cells()
        self.columns = self._cells.keys()
        """Names of the input columns."""
        self.optional_columns = {item.name for item in schema.inputs if item.contract.nullable}
        """Names of the input columns that a row may omit."""
        self.takes_k = schema.task == "ranking"
        """Whether a request may set k, the number of items per user."""

    def check(
        self,
        columns: Mapping[str, Sequence[Any]],
        num_rows: int,
        unit: Any,
        k: Any,
        other_violations: Sequence[Violation] = (),
        path: Callable[[Location], str] = dotted,
    ) -> Query:
        """Validate and convert columns of any protocol; a nullable column may be omitted.

        Raises Refused with all violations, including `other_violations`; `path` formats their locations.
        """
        violations: list[Violation] = []
        arrays = {}
        if columns or not other_violations:
            for name, cells in self._cells.items():
                values = columns.get(name)
                arrays[name], broken_rules = cells.read_all([None] * num_rows if values is None else values)
                for row, rule in broken_rules.items():
                    assert values is not None
                    violations.append(Violation(("rows", row, name), rule, values[row]))
        violations += other_violations
        if unit is not None and not _is_unit(unit):
            rule = f"must be a string of 1 to {MAX_UNIT_LENGTH} characters without NUL"
            violations.append(Violation(("unit",), rule, unit))
        if k is not None and self.takes_k and not (type(k) is int and 1 <= k <= self.schema.num_items):
            violations.append(Violation(("k",), f"must be an integer from 1 to {self.schema.num_items}", k))
        if violations:
            raise contract_refusal(violations, path)
        return Query(arrays, num_rows, unit, k)

    def require_num_rows(self, num_rows: int) -> None:
        """Raise Refused with 413 if a request has too many rows."""
        if num_rows > self.max_rows:
            raise Refused(
                413,
                "too many rows in one request; send several requests",
                [{"path": "rows", "message": f"must have at most {self.max_rows} rows, not {num_rows}"}],
            )


def contract_refusal(violations: Sequence[Violation], path: Callable[[Location], str] = dotted) -> Refused:
    """A refusal with 422 that lists violations by row; those without a row come last."""

    def row(violation: Violation) -> float:
        match violation.location:
            case ("rows", int(number), *_):
                return number
        return math.inf

    listed = sorted(violations, key=row)[:MAX_LISTED_VIOLATIONS]
    messages = [
        {"path": path(location), "message": _message(rule, value)} for location, rule, value in listed
    ]
    return unprocessable(len(violations), messages)


def validation_refusal(error: ValidationError) -> Refused:
    """A refusal of a body that pydantic cannot validate: 400 if it is not JSON, 422 otherwise."""
    if (count := error.error_count()) > MAX_VIOLATIONS:
        return Refused(422, f"the request breaks the contract in {count} places, too many to list")
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return Refused(400, f"the body must be JSON: {errors[0]['ctx']['error']}")
    messages = [{"path": dotted(e["loc"]), "message": e["msg"]} for e in errors[:MAX_LISTED_VIOLATIONS]]
    return unprocessable(len(errors), messages)


def unprocessable(num_violations: int, listed: Sequence[Mapping[str, str]]) -> Refused:
    """A refusal with 422; `listed` are formatted violations with the keys path and message."""
    return Refused(422, f"the request breaks the contract in {num_violations} places", listed)


def _message(rule: str, value: Any) -> str:
    if value is GENERAL:
        return rule
    return "must be given" if value is ABSENT else with_value(rule, value)


def _is_unit(unit: Any) -> bool:
    return type(unit) is str and 1 <= len(unit) <= MAX_UNIT_LENGTH and "\0" not in unit
