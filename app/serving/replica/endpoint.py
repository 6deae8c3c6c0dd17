"""The Ray Serve deployment of a registered model."""

import asyncio
import gc
import math
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import orjson
import starlette.requests
import starlette.responses
from ray.exceptions import RayError

from app.bundle.bundle import Ranking
from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving import logs
from app.serving.backoff import Backoff
from app.serving.control.status import State
from app.serving.gateway import limits
from app.serving.gateway.auth import ANYBODY, Authenticator, Principal
from app.serving.gateway.limits import Limiter
from app.serving.http import JSON, Request, Response, by_proxy
from app.serving.protocols import explain, openapi, rows, tensors
from app.serving.protocols.rows import MAX_UNIT_LENGTH, Answer, Question, Refused
from app.serving.replica import feedback
from app.serving.replica.autoscaling import LOAD, Busyness
from app.serving.replica.loaded import Live
from app.serving.replica.meters import Asked, Meters
from app.serving.replica.recorder import NotStored, Recorder
from app.serving.replica.shadow import Copy, Shadow
from app.serving.replica.workers import Columns
from app.serving.traffic.traffic import Traffic, cache, traffic
from app.serving.traffic.variants import located
from app.state.audit import Audit
from app.state.records import Prediction, Records

ALONE = ("/feedback", "/openapi.json")
"""Actions that are not those of a version."""
ACTIONS = {
    "": "GET", "/ready": "GET", "/openapi.json": "GET",
    "/predict": "POST", "/infer": "POST", "/explain": "POST", "/feedback": "POST",
}  # fmt: skip
"""What a model answers below /v2/models/<name> and, but for those in ALONE, below
/v2/models/<name>/versions/<version>."""
FOLLOW_S = 1.0
"""How often a replica looks whether the traffic has changed."""
RETRY = {"retry-after": "1"}

log = logs.log


@dataclass
class Note:
    """What a request turned out to be, for metrics and logs."""

    action: str = "none"
    variant: str = ""
    rows: int = 0
    principal: str = ""


class Endpoint:
    """One registered model under /v2/models/<name>: every replica holds all of its variants, but for those
    that have workers of their own."""

    def __init__(self, name: str, serving: Serving, issuer: Issuer | None):
        """Raises UserError if a bundle is broken or the variants take different inputs."""
        # So long a thread that writes records keeps the interpreter from a request; 5 ms otherwise.
        sys.setswitchinterval(0.0005)
        self._name = name
        self._limits = serving.limits
        self._log_requests = serving.log_requests
        self._auth = Authenticator(issuer) if issuer else None
        if self._auth is not None:
            self._auth.keys.start()
        self._limiter: Limiter | None = None
        if serving.limits.requests_per_s is not None:
            borrow = limits.Counter(limits.ask_root).borrow
            self._limiter = Limiter(name, serving.limits.requests_per_s, borrow)
        self._audit = Audit()
        self._fault: str | None
        self._entry, wanted, self._fault = cache.first(self._audit, name)
        self._refused = 0
        """The newest entry that could not be taken in."""
        self._retry = Backoff()
        self._swapping = asyncio.Lock()
        self._trusted_keys = serving.trusted_keys
        self._live = self._opened(wanted, None)
        cache.remember(name, self._entry, wanted)
        self._recorder = Recorder(Records(), serving.limits.feedback_per_hour) if serving.record else None
        self._shadows: dict[str, Shadow] = {}
        self._explaining = asyncio.Semaphore(explain.MAX_AT_ONCE)
        self._meters = Meters(name)
        self._busyness = Busyness()
        self._path = re.compile(rf"/v2/models/{re.escape(name)}(?:/versions/([^/]+))?(/[a-z.]+)?")
        self._cast()
        # What is there now stays: to look through all of it again takes 50 ms, in which nobody is answered.
        gc.collect()
        gc.freeze()
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def __del__(self) -> None:
        """Called by Serve when the last request is answered: nothing that was to be written is lost."""
        self._following.cancel()
        if self._auth is not None:
            self._auth.keys.stop()
        for shadow in self._shadows.values():
            shadow.close()
        if self._recorder:
            await asyncio.to_thread(self._recorder.close)
        self._audit.close()

    # What Serve and the commands ask

    def check_health(self) -> None:
        """Called by Serve, which starts a replica anew if this raises: BrokenBundle if a variant answers its
        stored example differently, RuntimeError if nothing looks for another traffic any more."""
        if self._following.done():
            raise RuntimeError("the task that looks for another traffic has ended")
        for bundle in self._live.bundles.values():
            bundle.check_example()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for `app.serving.replica.autoscaling`."""
        return {LOAD: self._busyness.share()}

    def state(self) -> State:
        """For the commands, by Serve's handle."""
        live, recording = self._live, self._recorder.recording() if self._recorder else None
        shadows = {name: shadow.dropped for name, shadow in self._shadows.items()}
        recent = self._meters.recent.tallies()
        fault = self._fault or (self._auth.keys.fault if self._auth else None)
        return State(self._entry, fault, live.versions, live.weights, recording, shadows, recent)

    async def refresh(self) -> State:
        """Take in now what holds, and say where that led."""
        await self._take_in(again=True)
        return self.state()

    # The traffic

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                await self._take_in(again=False)
                dropped = self._recorder.recording().dropped if self._recorder else {}
                self._meters.tell(sum(dropped.values()), self._live.weights)
            except Exception:
                log.exception("%s cannot look for another traffic, or tell its metrics", self._name)

    async def _take_in(self, again: bool) -> None:
        """Swap to the newest traffic, once it is loaded; what is served until then goes on.

        An entry that could not be loaded is tried again after a while, or at once if `again`. Why it was not
        is in `self._fault`, for `raylway status`.
        """
        async with self._swapping:  # of two swaps at once, the older would end last
            number = self._entry
            try:
                held = await asyncio.to_thread(traffic.current, self._audit, self._name)
                if held is None or held.number == self._entry:
                    self._fault = None
                    return
                if held.number < self._entry:  # a restored backup
                    raise UserError(
                        f"the audit log ends before entry {self._entry}, which this replica serves"
                    )
                number = held.number
                if number == self._refused and not (again or self._retry.due()):
                    return
                live = await asyncio.to_thread(self._opened, held.traffic, self._live)
            except Exception as error:
                expected = isinstance(error, UserError)
                reason = str(error) if expected else f"{type(error).__name__}: {str(error)[:500]}"
                if reason != self._fault:
                    log.error(
                        "the traffic of %s is not taken in: %s", self._name, reason, exc_info=not expected
                    )
                self._fault, self._refused = reason, number
                self._retry.failed()
                return
            self._live, self._entry, self._fault = live, number, None
            self._retry.succeeded()
            self._cast()
            await asyncio.to_thread(cache.remember, self._name, number, held.traffic)

    def _opened(self, wanted: Traffic, before: Live | None) -> Live:
        """A traffic with its bundles from this machine. Raises UserError if one is broken."""
        here = wanted.model_copy(update={"variants": located(self._name, wanted.variants)})
        return Live(here, self._limits.max_rows, before, self._trusted_keys)

    def _cast(self) -> None:
        """A shadow for each variant that is one."""
        before, self._shadows = self._shadows, {}
        if self._recorder is None:
            return
        for name, variant in self._live.traffic.variants.items():
            if not variant.shadow:
                continue
            shadow = before.get(name)
            if shadow is None or shadow.version != variant.version:
                remote, schema = self._live.remotes[name], self._live.schema
                shadow = Shadow(name, variant.version, remote, schema, self._recorder.add)
            self._shadows[name] = shadow
        for shadow in before.values():
            if shadow not in self._shadows.values():
                shadow.close()

    # Requests

    async def __call__(self, request: starlette.requests.Request) -> starlette.responses.Response:
        """A request by way of Serve's proxy."""
        return await by_proxy(self, request)

    async def respond(self, request: Request) -> Response:
        """Called by `app.serving.gateway.guard`."""
        begun, note = time.perf_counter(), Note()
        error = None
        try:
            response = await self._respond(request, note)
        except Refused as refused:
            response, error = Response.of(refused), str(refused)
        except Exception as defect:
            self._answered(request, note, 500, time.perf_counter() - begun, repr(defect))
            raise
        self._answered(request, note, response.status, time.perf_counter() - begun, error)
        return response

    def _answered(self, request: Request, note: Note, status: int, seconds: float, error: str | None) -> None:
        self._meters.note(Asked(note.action, note.variant, status, seconds, note.rows))
        # Those who ask too much are counted, and don't fill the log.
        if self._log_requests or (error is not None and status != 429):
            logs.request_answered(request, status, seconds, note.variant, note.principal, error)

    async def _respond(self, request: Request, note: Note) -> Response:
        version, action = self._route(request)
        note.action = action[1:] or "metadata"
        live = self._live
        if action == "/ready" and version in (None, *live.versions.values()):
            return Response(orjson.dumps({"name": self._name, "ready": True}))
        principal = await self._principal(request)
        note.principal = principal.name
        if action == "/feedback":
            return await self._feedback(request, principal)
        principal.require("explain" if action == "/explain" else "predict", self._name)
        forced = self._forced(live, request, version)
        if action == "":
            return Response(live.metadata(self._name, version))
        if action == "/openapi.json":
            return self._openapi(live)
        if forced is not None:
            principal.require("admin", self._name)
        body = await self._body(request, binary=action == "/infer")
        live = self._live  # it may have been swapped while the body arrived
        forced = self._forced(live, request, version)
        if action == "/predict":
            question = live.contract.parse(body)
            answer = await self._answer(live, question, forced, request, principal, note)
            return Response(rows.answer(answer, live.schema, question.k))
        if action == "/explain":
            return await self._explain(live, live.contract.parse(body), forced, request, note)
        length = request.header(tensors.HEADER_LENGTH.encode()) or None
        inference = tensors.parse(body, length, live.contract)
        answer = await self._answer(live, inference.question, forced, request, principal, note)
        content, media_type, headers = tensors.answer(answer, inference)
        return Response(content, 200, headers, media_type)

    def _openapi(self, live: Live) -> Response:
        document = openapi.document(
            self._name,
            live.schema,
            self._limits,
            live.example(),
            secured=self._auth is not None,
            feedback=self._recorder is not None,
        )
        return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))

    def _route(self, request: Request) -> tuple[str | None, str]:
        """The version asked for, if any, and one of ACTIONS. Raises Refused."""
        path = self._path.fullmatch(request.path)
        version, action = (path[1], path[2] or "") if path else (None, None)
        if action not in ACTIONS or (version and action in ALONE):
            known = ", ".join(f"{method} {action or '(metadata)'}" for action, method in ACTIONS.items())
            raise Refused(404, f"no such path; below /v2/models/{self._name} there are: {known}")
        request.require_method(ACTIONS[action])
        return version, action

    def _forced(self, live: Live, request: Request, version: str | None) -> str | None:
        """The variant that the client asks for: by its version in the path, or by name in a header. Raises
        Refused if it is not served."""
        if version is not None:
            for name, number in live.versions.items():
                if number == version:
                    return name
            versions = ", ".join(live.versions.values())
            raise Refused(404, f"version {version[:20]} of {self._name} is not served; these are: {versions}")
        name = request.header(b"x-raylway-variant")
        if name and name not in live.versions:
            raise Refused(422, f"the header x-raylway-variant must be one of {', '.join(live.versions)}")
        return name or None

    async def _principal(self, request: Request) -> Principal:
        """Who asks. Raises Refused if that is not known, or they have asked too much."""
        principal = ANYBODY
        if self._auth is not None:
            authorization = request.header(b"authorization")
            principal = self._auth.known(authorization) or await self._auth.principal(authorization)
        if self._limiter is not None and (wait_s := await self._limiter.wait_s(principal.name)):
            raise Refused(
                429,
                f"{principal.name} may ask {self._name} {self._limits.requests_per_s:g} times a second "
                "(serving.limits.requests_per_s)",
                headers={"retry-after": str(math.ceil(wait_s))},
            )
        return principal

    async def _feedback(self, request: Request, principal: Principal) -> Response:
        principal.require("feedback", self._name)
        if self._recorder is None:
            raise Refused(404, f"{self._name} keeps no records (serving.record), so it takes no feedback")
        said = feedback.parse(await self._body(request, binary=False), self._live.schema)
        try:
            return await feedback.answer(said, self._name, principal, self._recorder, self._limits)
        except NotStored:
            raise Refused(503, "the feedback cannot be stored now; send it again", headers=RETRY) from None

    async def _body(self, request: Request, binary: bool) -> bytes:
        """The whole body. Raises Refused, by the headers alone where they decide."""
        allowed = (JSON, "application/octet-stream") if binary else (JSON,)
        kind = request.header(b"content-type", JSON).partition(";")[0].strip().lower()
        if kind not in allowed or request.header(b"content-encoding", "identity") != "identity":
            raise Refused(415, f"the body must be {' or '.join(allowed)}, not compressed")
        return await request.body.read(self._limits.max_body_bytes)

    async def _answer(
        self,
        live: Live,
        question: Question,
        forced: str | None,
        request: Request,
        principal: Principal,
        note: Note,
    ) -> Answer:
        """The answer of the variant asked for, or of the one that the request's unit falls to."""
        at, begun = time.time(), time.perf_counter()
        unit = question.unit or _header_unit(request) or request.request_id
        note.variant, note.rows = forced or live.choose(unit), question.num_rows
        columns = question.columns
        answer = self._said(live, note.variant, request, await self._predict(live, note.variant, columns))
        if self._recorder is not None:
            prediction = Prediction(
                model=self._name,
                request_id=request.request_id,
                variant=note.variant,
                version=answer.version,
                role="forced" if forced else "served",
                unit=unit,
                principal=principal.name,
                at=at,
                seconds=time.perf_counter() - begun,
                rows=question.rows,
                answer=rows.said(answer, live.schema, question.k)["predictions"],
            )
            size = self._recorder.add(prediction)
            for shadow in self._shadows.values():
                shadow.offer(Copy(prediction, columns, size))
        return answer

    async def _explain(
        self, live: Live, question: Question, forced: str | None, request: Request, note: Note
    ) -> Response:
        """Of the variant that would answer."""
        explain.check(question, live.schema)
        unit = question.unit or _header_unit(request) or request.request_id
        note.variant, note.rows = forced or live.choose(unit), question.num_rows
        columns = question.columns
        walks = await asyncio.to_thread(live.walks, note.variant)
        given = await self._predict(live, note.variant, columns)
        bundle = live.bundles.get(note.variant)
        walked: np.ndarray | Ranking
        async with self._explaining:
            # The rows and their points together: far more than a request has, so not between two requests.
            points = await asyncio.to_thread(walks.points, columns)
            if bundle is not None:
                walked = await asyncio.to_thread(bundle.predict, points)
            else:
                walked = await self._predict(live, note.variant, points)
        assert not isinstance(walked, Ranking)
        answer = self._said(live, note.variant, request, given)
        return Response(explain.answer(answer, live.schema, walks, walked))

    def _said(self, live: Live, variant: str, request: Request, given: np.ndarray | Ranking) -> Answer:
        return Answer(
            model=self._name,
            variant=variant,
            version=live.versions[variant],
            request_id=request.request_id,
            probabilities=None if isinstance(given, Ranking) else given,
            ranking=given if isinstance(given, Ranking) else None,
        )

    async def _predict(self, live: Live, variant: str, columns: Columns) -> np.ndarray | Ranking:
        bundle = live.bundles.get(variant)
        if bundle is not None:
            return bundle.rank(columns) if live.schema.task == "ranking" else bundle.predict(columns)
        try:
            return await live.remotes[variant].predict(columns)
        except (TimeoutError, RayError) as error:
            log.error("%s of %s does not answer: %s", variant, self._name, error)
            raise Refused(503, f"{variant} does not answer now; try again", headers=RETRY) from None


def _header_unit(request: Request) -> str:
    """The header x-raylway-unit, which the ingress has checked to be UTF-8; empty if there is none."""
    unit = request.headers.get(b"x-raylway-unit", b"").decode()
    if len(unit) > MAX_UNIT_LENGTH:
        raise Refused(422, f"the header x-raylway-unit must not exceed {MAX_UNIT_LENGTH} characters")
    return unit
