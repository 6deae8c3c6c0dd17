"""Requests and answers as rows of JSON, and the contract that every request keeps, whatever its protocol.

    POST /v2/models/income/predict
    {"rows": [{"age": 39, "education": "Bachelors", ...}], "unit": "user-17"}

`unit` is optional: whoever sends the same one is answered by the same variant. The answer:

    {"model": "income", "variant": "challenger", "version": "2", "request_id": "0f3c...",
     "label": {"column": "income", "positive": ">50K"},
     "predictions": [{"probability": 0.83, "positive": true}]}

`probability` is that of `label.positive`, and `positive` is true from 0.5 on. A model of several classes says

     "label": {"column": "sentiment", "classes": ["negative", "neutral", "positive"]},
     "predictions": [{"label": "neutral",
                      "probabilities": {"negative": 0.11, "neutral": 0.75, "positive": 0.14}}]

A recommender takes users, and `k`, how many items of each (10 if left out). It says whether it knows the
user; who is not known gets the most popular items. Items that the user has had are left out, and `scores` can
be compared within one user's items alone:

    {"rows": [{"user_id": "17"}], "k": 2}

     "item": "movie_id",
     "predictions": [{"known": true, "items": ["268", "307"], "scores": [4.1, 3.9]}]

A refusal is a 4xx with
`{"error": "...", "violations": [{"path": "rows.3.age", "message": "..."}]}`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError
from pydantic_core import from_json

from app.bundle.bundle import Ranking
from app.bundle.schema import Schema
from app.data.cells import told
from app.errors import UserError

MAX_UNIT_LENGTH = 256
"""Characters of a unit."""
UNIT = r"^[^\x00]+$"
"""PostgreSQL keeps no text with a NUL."""
NUM_ITEMS = 10
"""How many items a recommender gives if the request does not say."""
NUM_VIOLATIONS = 100
"""How many violations a refusal lists; it counts them all."""
MAX_ERRORS = 10_000
"""Violations beyond which none is listed: to describe a million of them takes seconds and a gigabyte."""
ABSENT, GENERAL = object(), object()

Location = tuple[int | str, ...]
Violations = list[tuple[Location, str, Any]]
"""Places in a request, the rule that is broken there, and what came: ABSENT for nothing, GENERAL if the rule
says all. They become messages only when they are listed."""


def dotted(place: Location) -> str:
    """A place in a request, such as `rows.3.age`; `body` for all of it."""
    return ".".join(str(part)[:MAX_UNIT_LENGTH] for part in place) or "body"


class Refused(UserError):
    """A request that gets a 4xx, with everything that is wrong with it."""

    def __init__(
        self,
        status: int,
        error: str,
        violations: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(error)
        self.status = status
        self.violations = violations
        self.headers = headers or {}

    def body(self) -> bytes:
        return orjson.dumps({"error": str(self), "violations": list(self.violations[:NUM_VIOLATIONS])})


@dataclass(frozen=True)
class Question:
    """A request that keeps the contract, read."""

    columns: dict[str, np.ndarray]
    """An array (rows,) for each input, as `Bundle.predict` takes them."""
    num_rows: int
    unit: str | None
    k: int | None = None
    """Of a recommender: how many items; None if the request does not say."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as they were read, None for what is missing."""
        values = [array.tolist() for array in self.columns.values()]
        for column, array in zip(values, self.columns.values(), strict=True):
            if array.dtype == np.float64:
                column[:] = [None if value != value else value for value in column]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a variant says, whatever the protocol it is told in."""

    model: str
    variant: str
    version: str
    request_id: str
    probabilities: np.ndarray | None = None
    """float32 (rows,), or (rows, classes)"""
    ranking: Ranking | None = None
    """Of a recommender, instead."""


class Contract:
    """What the rows of a request must keep: the bundle's schema, ready to read them."""

    def __init__(self, schema: Schema, max_rows: int):
        self.schema = schema
        self.max_rows = max_rows
        self._cells = schema.cells()
        self._optional = {item.name for item in schema.inputs if item.contract.nullable}
        self._fields = ["rows", "unit", *(["k"] if schema.task == "ranking" else [])]

    def parse(self, body: bytes) -> Question:
        """A request in JSON. Raises Refused with all its violations."""
        try:
            document = from_json(body)
        except ValueError as error:
            raise Refused(400, f"the body must be JSON: {error}") from None
        if type(document) is not dict:
            raise _refused([((), f"must be an object with {', '.join(self._fields)}", GENERAL)])
        found: Violations = [
            ((name,), f"is unknown; allowed: {', '.join(self._fields)}", GENERAL)
            for name in document
            if name not in self._fields
        ]
        rows = document.get("rows")
        if type(rows) is not list or not rows:
            found.append((("rows",), "must be a list of at least one row", GENERAL))
            rows = []
        self._limit(len(rows))
        return self.check(
            self._columns(rows, found), len(rows), document.get("unit"), document.get("k"), found
        )

    def _columns(self, rows: list[Any], found: Violations) -> dict[str, list[Any]]:
        """The values of each column; what is wrong with a row as a whole is added to `found`."""
        known = self._cells.keys()
        for number, row in enumerate(rows):
            if type(row) is not dict:
                found.append((("rows", number), "must be an object", row))
            elif not row.keys() <= known:
                message = f"is unknown; allowed: {', '.join(known)}"
                found += [(("rows", number, name), message, GENERAL) for name in row if name not in known]
        if not rows or any(type(row) is not dict for row in rows):
            return {}
        absent = {name: None if name in self._optional else ABSENT for name in known}
        return {name: [row.get(name, absent[name]) for row in rows] for name in known}

    def check(
        self,
        columns: Mapping[str, Sequence[Any]],
        num_rows: int,
        unit: Any,
        k: Any,
        found: Violations | None = None,
        path: Callable[[Location], str] = dotted,
    ) -> Question:
        """Read columns of any origin, that of a missing nullable column left out.

        Raises Refused with all their violations and those in `found`; `path` names their places.
        """
        beside = found or []
        found, read = [], {}
        if columns or not beside:
            for name, cells in self._cells.items():
                values = columns.get(name)
                read[name], broken = cells.read_all([None] * num_rows if values is None else values)
                for row, rule in broken.items():
                    assert values is not None
                    found.append((("rows", row, name), rule, values[row]))
        found += beside
        if unit is not None and not _is_unit(unit):
            rule = f"must be a text of 1 to {MAX_UNIT_LENGTH} characters without NUL"
            found.append((("unit",), rule, unit))
        if k is not None and "k" in self._fields and not (type(k) is int and 1 <= k <= self.schema.num_items):
            found.append((("k",), f"must be an integer from 1 to {self.schema.num_items}", k))
        if found:
            raise _refused(found, path)
        return Question(read, num_rows, unit, k)

    def _limit(self, num_rows: int) -> None:
        if num_rows > self.max_rows:
            raise Refused(
                413,
                "too many rows in one request; send several requests",
                [{"path": "rows", "message": f"must have at most {self.max_rows} rows, not {num_rows}"}],
            )


def _refused(found: Violations, path: Callable[[Location], str] = dotted) -> Refused:
    def row(violation: tuple[Location, str, Any]) -> float:
        match violation[0]:
            case ("rows", int(number), *_):
                return number
        return math.inf

    # Row by row, whatever was checked first; what is wrong with the request as a whole comes last.
    ordered = sorted(found, key=row)[:NUM_VIOLATIONS]
    violations = [{"path": path(place), "message": _told(rule, came)} for place, rule, came in ordered]
    return Refused(422, f"the request breaks the contract in {len(found)} places", violations)


def _told(rule: str, value: Any) -> str:
    if value is GENERAL:
        return rule
    return "must be given" if value is ABSENT else told(rule, value)


def _is_unit(unit: Any) -> bool:
    return type(unit) is str and 1 <= len(unit) <= MAX_UNIT_LENGTH and "\0" not in unit


def answer(given: Answer, schema: Schema, k: int | None = None) -> bytes:
    """The answer to `Contract.parse`'s request, in JSON."""
    document = {
        "model": given.model,
        "variant": given.variant,
        "version": given.version,
        "request_id": given.request_id,
        **said(given, schema, k),
    }
    # float32 is written with its own shortest digits.
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def said(given: Answer, schema: Schema, k: int | None) -> dict[str, Any]:
    """What the model says, with the names of what it speaks of; float32 as it comes."""
    if given.ranking is not None:
        return _of_ranking(given.ranking, schema, k or NUM_ITEMS)
    assert given.probabilities is not None
    return (_of_classes if schema.task == "classes" else _of_binary)(given.probabilities, schema)


def _of_ranking(ranking: Ranking, schema: Schema, k: int) -> dict[str, Any]:
    rows = zip(ranking.items[:, :k], ranking.scores[:, :k], ranking.known, strict=True)
    predictions = []
    for items, scores, known in rows:
        count = int((items != "").sum())  # who has had nearly everything gets fewer
        predictions.append({"known": bool(known), "items": items[:count].tolist(), "scores": scores[:count]})
    return {"item": schema.label, "predictions": predictions}


def _of_binary(probabilities: np.ndarray, schema: Schema) -> dict[str, Any]:
    return {
        "label": {"column": schema.label, "positive": schema.positive},
        "predictions": [{"probability": p, "positive": bool(p >= 0.5)} for p in probabilities],
    }


def _of_classes(probabilities: np.ndarray, schema: Schema) -> dict[str, Any]:
    return {
        "label": {"column": schema.label, "classes": schema.classes},
        "predictions": [
            {
                "label": schema.classes[row.argmax()],
                "probabilities": dict(zip(schema.classes, row, strict=True)),
            }
            for row in probabilities
        ],
    }


def refusal(error: ValidationError) -> Refused:
    """What a client is told of an error in validation: 400 for no JSON, else 422."""
    if (count := error.error_count()) > MAX_ERRORS:
        return Refused(422, f"the request breaks the contract in {count} places, too many to list")
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return Refused(400, f"the body must be JSON: {errors[0]['ctx']['error']}")
    violations = [{"path": dotted(e["loc"]), "message": e["msg"]} for e in errors[:NUM_VIOLATIONS]]
    return Refused(422, f"the request breaks the contract in {len(errors)} places", violations)
