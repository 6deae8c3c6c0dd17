"""The Ray Serve deployment that speaks for all models."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import orjson
import starlette.requests
import starlette.responses

from app import __version__
from app.serving.control.status import statuses
from app.serving.gateway.guard import through_serve
from app.serving.gateway.limits import Buckets, Grant
from app.serving.http import Request, Response
from app.serving.protocols import docs_page


class Root:
    """What there is once for all models: the server's metadata and health, 404 for what nobody answers, the
    count of who asked how often, and the watch over endpoints that follow the registry or a bandit."""

    def __init__(self, secured: bool):
        """If `secured`, nobody is told which models there are: who asks here has shown no token."""
        self._secured = secured
        self._buckets = Buckets()

    async def borrow(self, model: str, principal: str, per_s: float, max_requests: int) -> Grant:
        """As `Buckets.borrow`, for the replicas of all endpoints."""
        return self._buckets.borrow(model, principal, per_s, max_requests)

    async def __call__(self, request: starlette.requests.Request) -> starlette.responses.Response:
        """A request by way of Serve's proxy."""
        return await through_serve(self, request)

    async def respond(self, request: Request) -> Response:
        path = request.path
        known: dict[str, Callable[[], Awaitable[Response]]] = {
            "/v2": self._metadata,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/v2/docs": self._page,
            **{f"/v2/docs/{name}": partial(self._asset, name) for name in docs_page.ASSETS},
        }
        if path not in known:
            models = ", ".join(sorted(await _models())) or "none"
            more = "" if self._secured else f"; models served under /v2/models: {models}"
            return _json(404, {"error": f"no such path{more}"})
        request.require_method("GET")
        return await known[path]()

    async def _page(self) -> Response:
        return Response(docs_page.page(), media_type="text/html; charset=utf-8")

    async def _asset(self, name: str) -> Response:
        content = await asyncio.to_thread(docs_page.asset, name)
        return Response(content, 200, {"cache-control": "max-age=86400"}, docs_page.ASSETS[name])

    async def _metadata(self) -> Response:
        return _json(200, {"name": "raylway", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _live(self) -> Response:
        return _json(200, {"live": True})

    async def _ready(self) -> Response:
        """200 only if there is a model, and every model's endpoint runs with all the replicas it wants."""
        models = await _models()
        ready = bool(models) and all(status == "RUNNING" for status in models.values())
        more: dict[str, object] = {} if self._secured else {"models": models}
        if not ready:
            more["error"] = "a model is not ready; try again" if models else "no model is served; try again"
        return _json(200 if ready else 503, {"ready": ready, **more})


async def _models() -> dict[str, str]:
    """Serve's status of each model's application."""
    return await asyncio.to_thread(statuses)


def _json(status: int, document: dict[str, object]) -> Response:
    return Response(orjson.dumps(document), status)
