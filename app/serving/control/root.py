"""The Ray Serve deployment that answers for the server as a whole, and keeps the counts of rate limits."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import orjson
import starlette.requests
import starlette.responses

from app import __version__
from app.serving.control.status import application_statuses
from app.serving.gateway.guard import through_serve
from app.serving.gateway.limits import Buckets, Grant
from app.serving.http import Request, Response
from app.serving.protocols import docs_page


class Root:
    """The server's metadata, health and documentation, 404 for unknown paths, and the rate limits' counts."""

    def __init__(
        self, hides_models: bool, read_statuses: Callable[[], dict[str, str]] = application_statuses
    ):
        """If `hides_models`, no response names a model: these paths are not authenticated.

        `read_statuses` returns Serve's status of each model's application.
        """
        self._hides_models = hides_models
        self._read_statuses = read_statuses
        self._buckets = Buckets()

    async def borrow(self, model: str, principal: str, per_s: float, max_requests: int) -> Grant:
        """Call `Buckets.borrow` for a replica of any endpoint."""
        return self._buckets.borrow(model, principal, per_s, max_requests)

    async def __call__(self, request: starlette.requests.Request) -> starlette.responses.Response:
        """Answer a request that Serve's own proxy passes on."""
        return await through_serve(self, request)

    async def respond(self, request: Request) -> Response:
        """Answer a request; called by `app.serving.gateway.guard`. Raises Refused if it is not a GET."""
        handler = HANDLERS.get(request.path)
        if handler is None:
            return await self._unknown_path()
        request.require_method("GET")
        return await handler(self)

    async def metadata(self) -> Response:
        """Name, version and extensions of the server, as the Open Inference Protocol describes them."""
        return _json(200, {"name": "raylway", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def live(self) -> Response:
        """200: the server runs."""
        return _json(200, {"live": True})

    async def ready(self) -> Response:
        """200 if there is a model and the endpoint of every model has its replicas, 503 otherwise."""
        models = await asyncio.to_thread(self._read_statuses)
        is_ready = bool(models) and all(status == "RUNNING" for status in models.values())
        document: dict[str, object] = {"ready": is_ready}
        if not self._hides_models:
            document["models"] = models
        if not is_ready:
            reason = "a model is not ready" if models else "no model is served"
            document["error"] = f"{reason}; try again"
        return _json(200 if is_ready else 503, document)

    async def docs(self) -> Response:
        """The page that shows the paths of a model."""
        return Response(docs_page.page(), media_type="text/html; charset=utf-8")

    async def docs_asset(self, name: str) -> Response:
        """A script or style sheet of the page."""
        content = await asyncio.to_thread(docs_page.asset, name)
        return Response(content, 200, {"cache-control": "max-age=86400"}, docs_page.ASSETS[name])

    async def _unknown_path(self) -> Response:
        if self._hides_models:
            return _json(404, {"error": "no such path"})
        models = ", ".join(sorted(await asyncio.to_thread(self._read_statuses))) or "none"
        return _json(404, {"error": f"no such path; models served under /v2/models: {models}"})


HANDLERS: dict[str, Callable[[Root], Awaitable[Response]]] = {
    "/v2": Root.metadata,
    "/v2/health/live": Root.live,
    "/v2/health/ready": Root.ready,
    "/v2/docs": Root.docs,
    **{f"/v2/docs/{name}": partial(Root.docs_asset, name=name) for name in docs_page.ASSETS},
}
"""The handlers of GET requests by path."""


def _json(status: int, document: dict[str, object]) -> Response:
    return Response(orjson.dumps(document), status)
