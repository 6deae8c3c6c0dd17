"""Requests and answers as rows of JSON.

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
    Violations,
    refused,
)


def parse(body: bytes, contract: Contract) -> Query:
    """The content of a request in JSON. Raises Refused with all its violations."""
    keys = ["rows", "unit", *(["k"] if contract.takes_k else [])]
    try:
        document = from_json(body)
    except ValueError as error:
        raise Refused(400, f"the body must be JSON: {error}") from None
    if type(document) is not dict:
        raise refused([((), f"must be an object with {', '.join(keys)}", GENERAL)])
    violations: Violations = [
        ((name,), f"is unknown; allowed: {', '.join(keys)}", GENERAL) for name in document if name not in keys
    ]
    rows = document.get("rows")
    if type(rows) is not list or not rows:
        violations.append((("rows",), "must be a list of at least one row", GENERAL))
        rows = []
    contract.require_num_rows(len(rows))
    columns = _columns(rows, contract, violations)
    return contract.check(columns, len(rows), document.get("unit"), document.get("k"), violations)


def _columns(rows: list[Any], contract: Contract, violations: Violations) -> dict[str, list[Any]]:
    """The values of each column. Adds to `violations` what is wrong with a row as a whole."""
    names = contract.columns
    for number, row in enumerate(rows):
        if type(row) is not dict:
            violations.append((("rows", number), "must be an object", row))
        elif not row.keys() <= names:
            message = f"is unknown; allowed: {', '.join(names)}"
            violations += [(("rows", number, name), message, GENERAL) for name in row if name not in names]
    if not rows or any(type(row) is not dict for row in rows):
        return {}
    absent = {name: None if name in contract.optional_columns else ABSENT for name in names}
    return {name: [row.get(name, absent[name]) for row in rows] for name in names}


def predictions(answer: Answer, schema: Schema, k: int | None = None) -> dict[str, Any]:
    """The key `predictions` of an answer, and the keys that name its labels or items; float32 as it comes."""
    if answer.ranking is not None:
        return _of_ranking(answer.ranking, schema, k or DEFAULT_NUM_ITEMS)
    assert answer.probabilities is not None
    return (_of_classes if schema.task == "classes" else _of_binary)(answer.probabilities, schema)


def encode(answer: Answer, predicted: dict[str, Any]) -> bytes:
    """The body of an answer in JSON; `predicted` is what `predictions` made of it."""
    document = {
        "model": answer.model,
        "variant": answer.variant,
        "version": answer.version,
        "request_id": answer.request_id,
        **predicted,
    }
    # float32 is written with its own shortest digits.
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _of_ranking(ranking: Ranking, schema: Schema, k: int) -> dict[str, Any]:
    users = zip(ranking.items[:, :k], ranking.scores[:, :k], ranking.known, strict=True)
    predictions = []
    for items, scores, known in users:
        count = int((items != "").sum())  # fewer than k where few are left
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
