"""Requests and answers as JSON rows.

    POST /v2/models/income/predict
    {"rows": [{"age": 39, "education": "Bachelors", ...}], "unit": "user-17"}

`unit` is optional; all requests with the same unit are answered by the same variant. The answer:

    {"model": "income", "variant": "challenger", "version": "2", "request_id": "0f3c...",
     "label": {"column": "income", "positive": ">50K"},
     "predictions": [{"probability": 0.83, "positive": true}]}

`probability` is the probability of `label.positive`, and `positive` is true from 0.5 on. The answer of a
model with several classes:

     "label": {"column": "sentiment", "classes": ["negative", "neutral", "positive"]},
     "predictions": [{"label": "neutral",
                      "probabilities": {"negative": 0.11, "neutral": 0.75, "positive": 0.14}}]

The rows of a recommender are users, and `k` is the number of items per user (10 by default). `known` is false
for a user without training data, who gets the most popular items. Items that a user already has are excluded.
`scores` can be compared only among the items of one user:

    {"rows": [{"user_id": "17"}], "k": 2}

     "item": "movie_id",
     "predictions": [{"known": true, "items": ["268", "307"], "scores": [4.1, 3.9]}]

A refusal has a 4xx status and the body
`{"error": "...", "violations": [{"path": "rows.3.age", "message": "..."}]}`.
"""

from typing import Any

import numpy as np
import orjson
from pydantic_core import from_json

from app.bundle.bundle import Ranking
from app.bundle.schema import Schema
from app.serving.http import Refused
from app.serving.protocols.contract import (
    ABSENT,
    DEFAULT_NUM_ITEMS,
    GENERAL,
    Answer,
    Contract,
    Query,
    Violation,
    contract_refusal,
)


def parse(body: bytes, contract: Contract) -> Query:
    """Parse a request. Raises Refused with all violations."""
    allowed = ["rows", "unit", *(["k"] if contract.takes_k else [])]
    try:
        document = from_json(body)
    except ValueError as error:
        raise Refused(400, f"the body must be JSON: {error}") from None
    if type(document) is not dict:
        raise contract_refusal([Violation((), f"must be an object with {', '.join(allowed)}", GENERAL)])
    violations = [
        Violation((name,), f"is unknown; allowed: {', '.join(allowed)}", GENERAL)
        for name in document
        if name not in allowed
    ]
    rows = document.get("rows")
    if type(rows) is not list or not rows:
        violations.append(Violation(("rows",), "must be a list of at least one row", GENERAL))
        rows = []
    contract.require_num_rows(len(rows))
    columns = _columns(rows, contract, violations)
    return contract.check(columns, len(rows), document.get("unit"), document.get("k"), violations)


def _columns(rows: list[Any], contract: Contract, violations: list[Violation]) -> dict[str, list[Any]]:
    """The values of all columns; {} if a row is not an object.

    Appends a violation for each row that is not an object, and for each unknown column.
    """
    names = contract.columns
    for number, row in enumerate(rows):
        if type(row) is not dict:
            violations.append(Violation(("rows", number), "must be an object", row))
        elif not row.keys() <= names:
            message = f"is unknown; allowed: {', '.join(names)}"
            unknown = [name for name in row if name not in names]
            violations += [Violation(("rows", number, name), message, GENERAL) for name in unknown]
    if not rows or any(type(row) is not dict for row in rows):
        return {}
    defaults = {name: None if name in contract.optional_columns else ABSENT for name in names}
    return {name: [row.get(name, defaults[name]) for row in rows] for name in names}


def predictions(answer: Answer, schema: Schema, k: int | None = None) -> dict[str, Any]:
    """The members `predictions` and `label` or `item` of an answer; numbers stay float32.

    `k` is the number of items per user, None for the default.
    """
    if answer.ranking is not None:
        return _ranking_predictions(answer.ranking, schema, k or DEFAULT_NUM_ITEMS)
    assert answer.probabilities is not None
    if schema.task == "classes":
        return _class_predictions(answer.probabilities, schema)
    return _binary_predictions(answer.probabilities, schema)


def encode(answer: Answer, predicted: dict[str, Any]) -> bytes:
    """Encode an answer as JSON; `predicted` is the result of `predictions`."""
    document = {
        "model": answer.model,
        "variant": answer.variant,
        "version": answer.version,
        "request_id": answer.request_id,
        **predicted,
    }
    # orjson writes a float32 with the shortest digits that identify it.
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _ranking_predictions(ranking: Ranking, schema: Schema, k: int) -> dict[str, Any]:
    users = zip(ranking.items[:, :k], ranking.scores[:, :k], ranking.known, strict=True)
    predictions = []
    for items, scores, known in users:
        num_items = int((items != "").sum())  # fewer than k if too few items remain
        predictions.append(
            {"known": bool(known), "items": items[:num_items].tolist(), "scores": scores[:num_items]}
        )
    return {"item": schema.label, "predictions": predictions}


def _binary_predictions(probabilities: np.ndarray, schema: Schema) -> dict[str, Any]:
    return {
        "label": {"column": schema.label, "positive": schema.positive},
        "predictions": [{"probability": p, "positive": bool(p >= 0.5)} for p in probabilities],
    }


def _class_predictions(probabilities: np.ndarray, schema: Schema) -> dict[str, Any]:
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
