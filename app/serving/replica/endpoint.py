"""The HTTP endpoint of one model: authenticates requests and routes them to actions."""

import math
import re
import time

from app.serving import logs
from app.serving.gateway.auth import ANONYMOUS
from app.serving.http import Refused, Request, Response
from app.serving.replica.actions import ACTIONS, Action
from app.serving.replica.call import Call, Services
from app.serving.replica.meters import CompletedRequest


class Endpoint:
    """One model under /v2/models/<name>."""

    def __init__(self, services: Services, log_requests: bool = False):
        """If `log_requests`, requests that succeed are logged, too."""
        self._services = services
        self._log_requests = log_requests
        self._path = re.compile(rf"/v2/models/{re.escape(services.model)}(?:/versions/([^/]+))?(/[a-z.]+)?")

    async def respond(self, request: Request) -> Response:
        """Answer a request. Called by `app.serving.gateway.guard`."""
        started = time.perf_counter()
        call = Call(request, self._services, self._services.loader.loaded)
        error = None
        try:
            response = await self._respond(call)
        except Refused as refused:
            response, error = Response.from_refusal(refused), str(refused)
        except Exception as defect:
            self._note(call, 500, time.perf_counter() - started, repr(defect))
            raise
        self._note(call, response.status, time.perf_counter() - started, error)
        return response

    async def _respond(self, call: Call) -> Response:
        action = self._route(call)
        if call.action == "ready" and call.version in (None, *call.loaded.versions.values()):
            return await action.respond(call)  # without a token, for load balancers
        await self._authenticate(call)
        call.sender.require(action.scope, self._services.model)
        if action.has_versions and call.forced_variant() is not None and action.predicts:
            call.sender.require("admin", self._services.model)
        return await action.respond(call)

    def _route(self, call: Call) -> Action:
        """The action of a call; sets the call's version and action.

        Raises Refused with 404 if the path has no action, and with 405 if the method is another one.
        """
        path = self._path.fullmatch(call.request.path)
        version, subpath = (path[1], path[2] or "") if path else (None, None)
        action = None if subpath is None else ACTIONS.get(subpath)
        if action is None or subpath is None or (version and not action.has_versions):
            allowed = ", ".join(f"{action.method} {path or '(metadata)'}" for path, action in ACTIONS.items())
            model = self._services.model
            raise Refused(404, f"no such path; below /v2/models/{model} there are: {allowed}")
        call.request.require_method(action.method)
        call.version, call.action = version, subpath[1:] or "metadata"
        return action

    async def _authenticate(self, call: Call) -> None:
        """Set the sender of a call.

        Raises Refused as `Authenticator.principal` does, and with 429 if the sender exceeds the rate limit.
        """
        authenticator, limiter = self._services.authenticator, self._services.limiter
        call.principal = ANONYMOUS
        if authenticator is not None:
            authorization = call.request.header(b"authorization")
            call.principal = authenticator.cached(authorization) or await authenticator.principal(
                authorization
            )
        if limiter is not None and (wait_s := await limiter.admit(call.principal.name)):
            raise Refused(
                429,
                f"{call.principal.name} must send at most {self._services.limits.requests_per_s:g} requests "
                f"per second to {self._services.model} (serving.limits.requests_per_s); try again later",
                headers={"retry-after": str(math.ceil(wait_s))},
            )

    def _note(self, call: Call, status: int, seconds: float, error: str | None) -> None:
        """Count a request, and log it if it failed or all requests are logged."""
        self._services.meters.observe(
            CompletedRequest(call.action, call.variant, status, seconds, call.num_rows)
        )
        # Rate-limited requests are counted, not logged.
        if self._log_requests or (error is not None and status != 429):
            principal = call.principal.name if call.principal else ""
            logs.log_request(call.request, status, seconds, call.variant, principal, error)
