"""OpenAPI 3.0 description of an endpoint.

https://spec.openapis.org/oas/v3.0.3
"""

from collections.abc import Mapping
from typing import Any

from app import __version__
from app.bundle.schema import Input, Schema
from app.config import Category, Number, Text
from app.config.serving import Limits
from app.serving.http import JSON
from app.serving.protocols import explain
from app.serving.protocols.contract import MAX_UNIT_LENGTH, UNIT_PATTERN

ERROR_STATUSES = ("400", "401", "403", "404", "405", "413", "415", "422", "429", "503")
"""Statuses of the refusals of an operation."""


def document(
    name: str, schema: Schema, limits: Limits, example: Mapping[str, Any], *, secured: bool, feedback: bool
) -> dict[str, Any]:
    """The OpenAPI document of a model's endpoint.

    `example` has a row and the answer to it (`row` and `answer`, the result of
    `app.serving.protocols.rows.predictions`). `secured` means that requests need a token, and `feedback` that
    the endpoint accepts feedback.
    """
    row = {
        "type": "object",
        "properties": {item.name: _value(item) for item in schema.inputs},
        "required": [item.name for item in schema.inputs if not item.contract.nullable],
        "additionalProperties": False,
    }
    rows = {"type": "array", "items": row, "minItems": 1, "maxItems": limits.max_rows}
    unit = {
        "type": "string", "minLength": 1, "maxLength": MAX_UNIT_LENGTH, "pattern": UNIT_PATTERN,
        "nullable": True,
        "description": "All requests with the same unit are answered by the same variant.",
    }  # fmt: skip
    properties: dict[str, Any] = {"rows": rows, "unit": unit}
    if schema.task == "ranking":
        properties["k"] = {"type": "integer", "minimum": 1, "maximum": schema.num_items, "nullable": True}
    base = f"/v2/models/{name}"
    answer = {
        "model": name, "variant": "champion", "version": "1", "request_id": "0f3c2b7e",
    }  # fmt: skip
    paths: dict[str, Any] = {
        f"{base}/predict": {
            "post": _operation(
                "predict",
                "Predict",
                _object(properties, ["rows"]),
                {"rows": [example["row"]], "unit": "user-17"},
                _predictions(schema),
                {**answer, **example["answer"]},
            )
        }
    }
    if schema.task != "ranking" and all(item.contract.type != "text" for item in schema.inputs):
        explained_rows = {**rows, "maxItems": min(explain.max_rows(len(schema.inputs)), limits.max_rows)}
        paths[f"{base}/explain"] = {
            "post": _operation(
                "explain",
                "Explain predictions by the contributions of the columns",
                _object({"rows": explained_rows, "unit": unit}, ["rows"]),
                {"rows": [example["row"]], "unit": "user-17"},
                _explanations(),
                None,
            )
        }
    if feedback:
        paths[f"{base}/feedback"] = {"post": _feedback(schema)}
    paths[f"{base}/ready"] = {
        "get": {
            "operationId": "ready",
            "summary": "Check whether the endpoint is ready",
            "security": [],
            "responses": {
                "200": {"description": "The endpoint is ready.", "content": _json({"type": "object"})}
            },
        }
    }
    description: dict[str, Any] = {
        "openapi": "3.0.3",
        "info": {"title": name, "version": __version__, "description": f"Predicts `{schema.label}`."},
        "paths": paths,
        "components": {"schemas": {"Refusal": _refusal()}},
    }
    if secured:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return description


def _operation(
    operation: str,
    summary: str,
    request_schema: dict[str, Any],
    request_example: Any,
    response_schema: dict[str, Any],
    response_example: Any,
) -> dict[str, Any]:
    refusal = {"description": "Refused.", "content": _json({"$ref": "#/components/schemas/Refusal"})}
    answered = {"description": "Answered.", "content": _json(response_schema, response_example)}
    return {
        "operationId": operation,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(request_schema, request_example)},
        "responses": {"200": answered} | dict.fromkeys(ERROR_STATUSES, refusal),
    }


def _feedback(schema: Schema) -> dict[str, Any]:
    outcome: dict[str, Any] = {
        "nullable": True,
        "anyOf": [{"type": t} for t in ("string", "number", "boolean")],
    }
    if schema.classes:
        outcome = {"nullable": True, "type": "string", "enum": [*schema.classes, None]}
    request = _object(
        {
            "request_id": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
            "outcomes": {"type": "array", "items": outcome, "minItems": 1, "nullable": True},
            "reward": {"type": "number", "minimum": 0, "maximum": 1, "nullable": True},
            "principal": {"type": "string", "minLength": 1, "maxLength": 256, "nullable": True},
        },
        ["request_id"],
    )
    response = _object({"request_id": {"type": "string"}, "status": {"type": "string"}}, ["status"])
    example = {"request_id": "0f3c2b7e"}
    operation = _operation(
        "feedback",
        "Report the outcome of a prediction",
        request,
        {**example, "reward": 1.0},
        response,
        {**example, "status": "stored"},
    )
    responses = operation["responses"]
    ok, refusal = responses["200"], responses["422"]
    responses["200"] = {**ok, "description": "The same feedback is stored already."}
    responses["201"] = {**ok, "description": "Stored."}
    responses["202"] = {
        **ok,
        "description": "Stored separately: the prediction is unknown, or the hourly limit is exceeded.",
    }
    responses["409"] = {**refusal, "description": "Different feedback is stored already, and is kept."}
    responses["410"] = {**refusal, "description": "The prediction is too old."}
    return operation


def _predictions(schema: Schema) -> dict[str, Any]:
    """Schema of the answer to `predict`."""
    number = {"type": "number"}
    if schema.task == "ranking":
        prediction = _object(
            {
                "known": {"type": "boolean"},
                "items": {"type": "array", "items": {"type": "string"}},
                "scores": {"type": "array", "items": number},
            },
            ["known", "items", "scores"],
        )
        described: dict[str, Any] = {"item": {"type": "string"}}
    elif schema.task == "classes":
        probabilities = _object(dict.fromkeys(schema.classes, number), schema.classes)
        label = {"type": "string", "enum": schema.classes}
        prediction = _object({"label": label, "probabilities": probabilities}, ["label", "probabilities"])
        described = {"label": {"type": "object"}}
    else:
        probability = {"type": "number", "minimum": 0, "maximum": 1}
        prediction = _object(
            {"probability": probability, "positive": {"type": "boolean"}}, ["probability", "positive"]
        )
        described = {"label": {"type": "object"}}
    return _answer(described | {"predictions": {"type": "array", "items": prediction}})


def _explanations() -> dict[str, Any]:
    """Schema of the answer to `explain`."""
    attributions = {"type": "object", "additionalProperties": {"type": "number"}}
    properties: dict[str, Any] = {name: {"type": "number"} for name in ("output", "base")}
    properties |= {"attributions": attributions, "label": {"type": "string"}}
    explanation = _object(properties, ["output", "base"])
    return _answer({"of": {"type": "string"}, "explanations": {"type": "array", "items": explanation}})


def _answer(properties: dict[str, Any]) -> dict[str, Any]:
    """Schema of an answer with these members, after those that all answers have."""
    strings = {name: {"type": "string"} for name in ("model", "variant", "version", "request_id")}
    return _object({**strings, **properties}, [*strings, *properties])


def _refusal() -> dict[str, Any]:
    """Schema of the body of a refusal."""
    violation = _object({"path": {"type": "string"}, "message": {"type": "string"}}, ["path", "message"])
    return {
        "type": "object",
        "properties": {"error": {"type": "string"}, "violations": {"type": "array", "items": violation}},
        "required": ["error"],
    }


def _value(item: Input) -> dict[str, Any]:
    """Schema of the value of an input column."""
    contract = item.contract
    value: dict[str, Any]
    if isinstance(contract, Number):
        value = {"type": "number", "minimum": contract.min, "maximum": contract.max}
    elif isinstance(contract, Text):
        value = {"type": "string", "minLength": 1, "maxLength": contract.max_characters}
    else:
        assert isinstance(contract, Category)
        allowed = item.allowed
        missing = [None] if contract.nullable else []
        value = {"type": "string", "minLength": 1, "enum": None if allowed is None else [*allowed, *missing]}
    value["nullable"] = contract.nullable or None
    return {keyword: setting for keyword, setting in value.items() if setting is not None}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": required, "additionalProperties": False
    }  # fmt: skip


def _json(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    return {JSON: {"schema": schema} | ({} if example is None else {"example": example})}
