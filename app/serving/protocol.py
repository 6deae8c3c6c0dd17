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

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails, SchemaValidator, core_schema

from app.bundle import Input, Ranking, Schema
from app.config import Category
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
NUM_VALUES = 20
"""How many of the values allowed a violation names."""

Location = tuple[int | str, ...]


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
    """A request that keeps the contract."""

    rows: list[dict[str, Any]]
    unit: str | None
    k: int | None = None
    """Of a recommender: how many items; None if the request does not say."""


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
    """What the rows of a request must keep: the bundle's schema, compiled."""

    def __init__(self, schema: Schema, max_rows: int):
        self.schema = schema
        self.max_rows = max_rows
        self._columns = {item.name: allowed(item) for item in schema.inputs}
        field = core_schema.typed_dict_field
        row = core_schema.typed_dict_schema(
            {item.name: field(_value(item), required=not item.contract.nullable) for item in schema.inputs},
            extra_behavior="forbid",
        )
        unit = core_schema.str_schema(pattern=UNIT, min_length=1, max_length=MAX_UNIT_LENGTH, strict=True)
        request = {
            "rows": field(core_schema.list_schema(row, min_length=1, max_length=max_rows, strict=True)),
            "unit": field(core_schema.nullable_schema(unit), required=False),
        }
        if schema.task == "ranking":
            k = core_schema.int_schema(ge=1, le=schema.num_items, strict=True)
            request["k"] = field(core_schema.nullable_schema(k), required=False)
        self._fields = list(request)
        self._validator = SchemaValidator(core_schema.typed_dict_schema(request, extra_behavior="forbid"))

    def parse(self, body: bytes) -> Question:
        """A request in JSON. Raises Refused with all its violations."""
        try:
            request = self._validator.validate_json(body)
        except ValidationError as error:
            raise refusal(error, self._message) from None
        return Question(request["rows"], request.get("unit"), request.get("k"))

    def check(
        self, rows: list[dict[str, Any]], unit: str | None, k: int | None, path: Callable[[Location], str]
    ) -> Question:
        """Rows of any origin. Raises Refused with all their violations; `path` names their places."""
        given = {"rows": rows, "unit": unit, "k": k}
        try:
            request = self._validator.validate_python({name: given[name] for name in self._fields})
        except ValidationError as error:
            raise refusal(error, self._message, path) from None
        return Question(request["rows"], unit, k)

    def _message(self, error: ErrorDetails) -> str:
        place, came = error["loc"], _short(error["input"])
        match error["type"]:
            case "extra_forbidden":
                return f"is unknown; allowed: {', '.join(self._columns if len(place) > 1 else self._fields)}"
            case "missing":
                return "must be given"
            case "literal_error":
                values = self._columns[str(place[-1])] or []
                more = f" and {len(values) - NUM_VALUES} more" if len(values) > NUM_VALUES else ""
                return f"must be one of {', '.join(values[:NUM_VALUES])}{more}, not {came}"
            case "too_long" | "too_short":
                return error["msg"]
            case _:
                return f"{error['msg']}, not {came}"


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


def dotted(place: Location) -> str:
    """A place in a request, such as `rows.3.age`; `body` for all of it."""
    return ".".join(str(part)[:MAX_UNIT_LENGTH] for part in place) or "body"


def refusal(
    error: ValidationError,
    message: Callable[[ErrorDetails], str] = lambda error: error["msg"],
    path: Callable[[Location], str] = dotted,
) -> Refused:
    """What a client is told of an error in validation: 400 for no JSON, 413 for too many rows, else 422."""
    if (count := error.error_count()) > MAX_ERRORS:
        return Refused(422, f"the request breaks the contract in {count} places, too many to list")
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return Refused(400, f"the body must be JSON: {errors[0]['ctx']['error']}")
    violations = [{"path": path(e["loc"]), "message": message(e)} for e in errors[:NUM_VIOLATIONS]]
    if any(e["type"] == "too_long" and e["loc"] == ("rows",) for e in errors):
        return Refused(413, "too many rows in one request; send several requests", violations)
    return Refused(422, f"the request breaks the contract in {len(errors)} places", violations)


def allowed(item: Input) -> list[str] | None:
    """The values that a request may have in a column; None if any."""
    if not isinstance(item.contract, Category):
        return None
    return item.known or [] if item.contract.unseen == "refuse" else item.contract.values


def _value(item: Input) -> core_schema.CoreSchema:
    """The check of one value; strict, so that neither true nor "39" is a number."""
    contract, values = item.contract, allowed(item)
    value: core_schema.CoreSchema
    if contract.type == "number":
        value = core_schema.float_schema(ge=contract.min, le=contract.max, allow_inf_nan=False, strict=True)
    elif contract.type == "text":
        value = core_schema.str_schema(min_length=1, max_length=contract.max_characters, strict=True)
    elif values is None:
        # The empty string is how the graph spells a missing value; here that is null.
        value = core_schema.str_schema(min_length=1, strict=True)
    else:
        # A column that was empty in all of the training part can only be missing.
        value = core_schema.literal_schema(values) if values else core_schema.none_schema()
    return core_schema.nullable_schema(value) if contract.nullable else value


def _short(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)
