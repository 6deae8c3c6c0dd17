"""What an endpoint takes and gives, as OpenAPI 3.0, and a page to try it on.

https://spec.openapis.org/oas/v3.0.3
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app import __version__
from app.bundle.schema import Input, Schema
from app.config import Category, Number, Text
from app.config.serving import Limits
from app.serving.protocols import explain
from app.serving.protocols.contract import MAX_UNIT_LENGTH, UNIT_PATTERN

ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
"""What the page needs besides itself, of Swagger UI."""
PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Raylway: endpoints</title>
<link rel="stylesheet" href="/v2/docs/swagger-ui.css">
<style>
form { font: 15px system-ui, sans-serif; display: flex; gap: 1em; padding: 1em 20px; background: #f4f4f6 }
input { font: inherit; padding: .3em .5em }
#token { flex: 1 }
#said { padding: 1em 20px; font: 15px system-ui, sans-serif; color: #a00 }
.topbar { display: none }
</style>
</head>
<body>
<form id="form">
<label>Model <input id="model" name="model" required pattern="[a-z0-9_-]+"></label>
<input id="token" type="password" placeholder="token, if the endpoint asks for one (raylway token NAME)"
 autocomplete="off">
<button>Show</button>
</form>
<div id="said"></div>
<div id="page"></div>
<script src="/v2/docs/swagger-ui-bundle.js"></script>
<script>
const model = document.getElementById("model"), token = document.getElementById("token"),
  said = document.getElementById("said");
const authorized = request => {
  if (token.value) request.headers.Authorization = "Bearer " + token.value;
  return request;
};
async function show() {
  said.textContent = "";
  const request = authorized({headers: {}});
  const answer = await fetch("/v2/models/" + encodeURIComponent(model.value) + "/openapi.json", request);
  const document_ = await answer.json();
  if (!answer.ok) { said.textContent = document_.error; return; }
  SwaggerUIBundle({spec: document_, dom_id: "#page", requestInterceptor: authorized});
}
document.getElementById("form").addEventListener("submit", event => {
  event.preventDefault();
  history.replaceState(null, "", "?model=" + encodeURIComponent(model.value));
  show();
});
model.value = new URLSearchParams(location.search).get("model") || "";
if (model.value) show();
</script>
</body>
</html>
"""


def asset(name: str) -> bytes:
    """One of ASSETS."""
    import swagger_ui_bundle

    return (Path(swagger_ui_bundle.swagger_ui_path) / name).read_bytes()


def document(
    name: str, schema: Schema, limits: Limits, example: Mapping[str, Any], *, secured: bool, feedback: bool
) -> dict[str, Any]:
    """The description of a model's endpoint. `example` is a row that it answers, and what it says to it
    (`app.serving.protocols.rows.document`)."""
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
        "description": "Whoever sends the same one is answered by the same variant.",
    }  # fmt: skip
    properties: dict[str, Any] = {"rows": rows, "unit": unit}
    if schema.task == "ranking":
        properties["k"] = {"type": "integer", "minimum": 1, "maximum": schema.num_items, "nullable": True}
    asked = _object(properties, ["rows"])
    base = f"/v2/models/{name}"
    answered = {
        "model": name, "variant": "champion", "version": "1", "request_id": "0f3c2b7e",
    }  # fmt: skip
    paths: dict[str, Any] = {
        f"{base}/predict": {
            "post": _operation(
                "predict",
                "Predict",
                asked,
                {"rows": [example["row"]], "unit": "user-17"},
                _answer(schema),
                {**answered, **example["answer"]},
            )
        }
    }
    if schema.task != "ranking" and all(item.contract.type != "text" for item in schema.inputs):
        few = {**rows, "maxItems": min(explain.max_rows(len(schema.inputs)), limits.max_rows)}
        paths[f"{base}/explain"] = {
            "post": _operation(
                "explain",
                "Say what each column adds to the answer",
                _object({"rows": few, "unit": unit}, ["rows"]),
                {"rows": [example["row"]], "unit": "user-17"},
                _explanation(),
                None,
            )
        }
    if feedback:
        paths[f"{base}/feedback"] = {"post": _feedback(schema)}
    paths[f"{base}/ready"] = {
        "get": {
            "operationId": "ready",
            "summary": "Whether it answers",
            "security": [],
            "responses": {"200": {"description": "It does.", "content": _json({"type": "object"})}},
        }
    }
    found: dict[str, Any] = {
        "openapi": "3.0.3",
        "info": {"title": name, "version": __version__, "description": f"Predicts `{schema.label}`."},
        "paths": paths,
        "components": {"schemas": {"Refusal": _refusal()}},
    }
    if secured:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


def _operation(
    operation: str, summary: str, asked: dict[str, Any], example: Any, answered: dict[str, Any], answer: Any
) -> dict[str, Any]:
    refused = {"description": "Refused.", "content": _json({"$ref": "#/components/schemas/Refusal"})}
    statuses = ("400", "401", "403", "404", "405", "413", "415", "422", "429", "503")
    return {
        "operationId": operation,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(asked, example)},
        "responses": {"200": {"description": "Answered.", "content": _json(answered, answer)}}
        | dict.fromkeys(statuses, refused),
    }


def _feedback(schema: Schema) -> dict[str, Any]:
    outcome: dict[str, Any] = {
        "nullable": True,
        "anyOf": [{"type": t} for t in ("string", "number", "boolean")],
    }
    if schema.classes:
        outcome = {"nullable": True, "type": "string", "enum": [*schema.classes, None]}
    asked = _object(
        {
            "request_id": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
            "outcomes": {"type": "array", "items": outcome, "minItems": 1, "nullable": True},
            "reward": {"type": "number", "minimum": 0, "maximum": 1, "nullable": True},
            "principal": {"type": "string", "minLength": 1, "maxLength": 256, "nullable": True},
        },
        ["request_id"],
    )
    answered = _object({"request_id": {"type": "string"}, "status": {"type": "string"}}, ["status"])
    example = {"request_id": "0f3c2b7e"}
    found = _operation(
        "feedback",
        "Say what came of a prediction",
        asked,
        {**example, "reward": 1.0},
        answered,
        {**example, "status": "stored"},
    )
    found["responses"] |= {
        "200": {**found["responses"]["200"], "description": "The same was said before."},
        "201": {**found["responses"]["200"], "description": "Stored."},
        "202": {
            **found["responses"]["200"],
            "description": "Stored apart: no such prediction is known, or more than may be said in an hour.",
        },
        "409": {**found["responses"]["422"], "description": "Something else was said before, and stays."},
        "410": {**found["responses"]["422"], "description": "The prediction is too old."},
    }
    return found


def _answer(schema: Schema) -> dict[str, Any]:
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
        about: dict[str, Any] = {"item": {"type": "string"}}
    elif schema.task == "classes":
        shares = _object(dict.fromkeys(schema.classes, number), schema.classes)
        label = {"type": "string", "enum": schema.classes}
        prediction = _object({"label": label, "probabilities": shares}, ["label", "probabilities"])
        about = {"label": {"type": "object"}}
    else:
        probability = {"type": "number", "minimum": 0, "maximum": 1}
        prediction = _object(
            {"probability": probability, "positive": {"type": "boolean"}}, ["probability", "positive"]
        )
        about = {"label": {"type": "object"}}
    return _answered(about | {"predictions": {"type": "array", "items": prediction}})


def _explanation() -> dict[str, Any]:
    added = {"type": "object", "additionalProperties": {"type": "number"}}
    properties: dict[str, Any] = {name: {"type": "number"} for name in ("output", "base")}
    each = _object({**properties, "attributions": added, "label": {"type": "string"}}, ["output", "base"])
    return _answered({"of": {"type": "string"}, "explanations": {"type": "array", "items": each}})


def _answered(more: dict[str, Any]) -> dict[str, Any]:
    strings = {name: {"type": "string"} for name in ("model", "variant", "version", "request_id")}
    return _object({**strings, **more}, [*strings, *more])


def _refusal() -> dict[str, Any]:
    violation = _object({"path": {"type": "string"}, "message": {"type": "string"}}, ["path", "message"])
    return {
        "type": "object",
        "properties": {"error": {"type": "string"}, "violations": {"type": "array", "items": violation}},
        "required": ["error"],
    }


def _value(item: Input) -> dict[str, Any]:
    contract = item.contract
    found: dict[str, Any]
    if isinstance(contract, Number):
        found = {"type": "number", "minimum": contract.min, "maximum": contract.max}
    elif isinstance(contract, Text):
        found = {"type": "string", "minLength": 1, "maxLength": contract.max_characters}
    else:
        assert isinstance(contract, Category)
        values = item.allowed
        nothing = [None] if contract.nullable else []
        found = {"type": "string", "minLength": 1, "enum": None if values is None else [*values, *nothing]}
    found["nullable"] = contract.nullable or None
    return {name: value for name, value in found.items() if value is not None}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": required, "additionalProperties": False
    }  # fmt: skip


def _json(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    return {"application/json": {"schema": schema} | ({} if example is None else {"example": example})}
