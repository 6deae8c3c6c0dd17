"""The Ray Serve deployments: an endpoint for each registered model, and the root that speaks for all."""

import asyncio
import re
import uuid
from collections.abc import Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response

from app import __version__
from app.bundle import columns_of
from app.serving import protocol, routing, tensors
from app.serving.protocol import MAX_UNIT_LENGTH, Answer, Contract, Question, Refused
from app.serving.variants import Deployed, common_schema, load

ROOT = "Raylway"
"""The root's application; a model's name, which its application has, has no capital."""
JSON = "application/json"
ACTIONS = {"": "GET", "/ready": "GET", "/predict": "POST", "/infer": "POST"}
"""What a model answers below /v2/models/<name> and below /v2/models/<name>/versions/<version>."""


class Endpoint:
    """One registered model under /v2/models/<name>: every replica holds all of its variants."""

    def __init__(
        self, name: str, variants: Mapping[str, Deployed], *, salt: str, max_rows: int, max_body_bytes: int
    ):
        """Raises UserError if a bundle is broken or the variants take different inputs."""
        self._name = name
        self._salt = salt
        self._max_body_bytes = max_body_bytes
        self._bundles = load(variants)
        self._weights = {variant: v.weight for variant, v in variants.items()}
        self._versions = {variant: v.version for variant, v in variants.items()}
        self._schema = common_schema({variant: b.schema for variant, b in self._bundles.items()})
        self._contract = Contract(self._schema, max_rows)
        self._path = re.compile(rf"/v2/models/{re.escape(name)}(?:/versions/([^/]+))?(/[a-z]+)?")

    def check_health(self) -> None:
        """Called by Serve: raises BrokenBundle if a variant answers its stored example differently."""
        for bundle in self._bundles.values():
            bundle.check_example()

    async def __call__(self, request: Request) -> Response:
        """Every answer is JSON (or v2's binary) with a Content-Length: half a chunked one can look whole."""
        try:
            return await self._respond(request)
        except Refused as refused:
            return Response(refused.body(), refused.status, media_type=JSON)

    async def _respond(self, request: Request) -> Response:
        path = self._path.fullmatch(request.scope["path"])
        version, action = (path[1], path[2] or "") if path else (None, None)
        if action not in ACTIONS:
            known = ", ".join(f"{method} {action or '(metadata)'}" for action, method in ACTIONS.items())
            raise Refused(404, f"no such path; below /v2/models/{self._name} there are: {known}")
        if request.method != ACTIONS[action]:
            error = f"{request.method} is not allowed here, {ACTIONS[action]} is"
            return Response(Refused(405, error).body(), 405, {"allow": ACTIONS[action]}, JSON)
        if version is not None and version not in self._versions.values():
            versions = ", ".join(self._versions.values())
            raise Refused(404, f"version {version[:20]} of {self._name} is not served; these are: {versions}")
        if action == "":
            numbers = [version] if version else list(self._versions.values())
            return Response(tensors.metadata(self._name, numbers, self._schema), media_type=JSON)
        if action == "/ready":
            return Response(orjson.dumps({"name": self._name, "ready": True}), media_type=JSON)
        body = await self._body(request, binary=action == "/infer")
        if action == "/predict":
            question = self._contract.parse(body)
            given = self._answer(question, version, request)
            return Response(protocol.answer(given, self._schema, question.k), media_type=JSON)
        inference = tensors.parse(body, request.headers.get(tensors.HEADER_LENGTH), self._contract)
        content, headers = tensors.answer(self._answer(inference.question, version, request), inference)
        return Response(content, headers=headers)

    async def _body(self, request: Request, binary: bool) -> bytes:
        allowed = (JSON, "application/octet-stream") if binary else (JSON,)
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in allowed or request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, f"the body must be {' or '.join(allowed)}, not compressed")
        body = await request.body()
        if len(body) > self._max_body_bytes:
            raise Refused(413, f"the body must not exceed {self._max_body_bytes} bytes")
        return body

    def _answer(self, question: Question, version: str | None, request: Request) -> Answer:
        """The answer of the version asked for, or of the variant that the request's unit falls to."""
        # Serve has given an id to a request without one, and echoes it in the answer's header.
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        if version is None:
            unit = question.unit or _header_unit(request) or request_id
            variant = routing.choose(unit, self._salt, self._weights)
        else:
            variant = next(name for name, number in self._versions.items() if number == version)
        columns, bundle = columns_of(self._schema, question.rows), self._bundles[variant]
        is_ranking = self._schema.task == "ranking"
        return Answer(
            model=self._name,
            variant=variant,
            version=self._versions[variant],
            request_id=request_id,
            probabilities=None if is_ranking else bundle.predict(columns),
            ranking=bundle.rank(columns) if is_ranking else None,
        )


def _header_unit(request: Request) -> str:
    """The header x-raylway-unit, which the ingress has checked to be UTF-8; empty if there is none."""
    unit = request.headers.get("x-raylway-unit", "").encode("latin-1").decode()
    if len(unit) > MAX_UNIT_LENGTH:
        raise Refused(422, f"the header x-raylway-unit must not exceed {MAX_UNIT_LENGTH} characters")
    return unit


class Root:
    """What no model answers: the server's metadata and health, and 404 for everything else."""

    async def __call__(self, request: Request) -> Response:
        path = request.scope["path"]
        known = {"/v2": self._metadata, "/v2/health/live": self._live, "/v2/health/ready": self._ready}
        if path not in known:
            models = ", ".join(sorted(await _models())) or "none"
            return _json(404, {"error": f"no such path; models served under /v2/models: {models}"})
        if request.method != "GET":
            response = _json(405, {"error": f"{request.method} is not allowed here, GET is"})
            response.headers["allow"] = "GET"
            return response
        return await known[path]()

    async def _metadata(self) -> Response:
        return _json(200, {"name": "raylway", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _live(self) -> Response:
        return _json(200, {"live": True})

    async def _ready(self) -> Response:
        """200 only if every model's endpoint runs with all the replicas it wants."""
        models = await _models()
        ready = all(status == "RUNNING" for status in models.values())
        return _json(200 if ready else 503, {"ready": ready, "models": models})


async def _models() -> dict[str, str]:
    """Serve's status of each model's application."""
    from ray import serve

    applications = (await asyncio.to_thread(serve.status)).applications
    return {name: str(app.status.value) for name, app in applications.items() if name != ROOT}


def _json(status: int, document: dict[str, object]) -> Response:
    return Response(orjson.dumps(document), status, media_type=JSON)
