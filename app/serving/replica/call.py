"""A call of an endpoint: a request, and the state of its processing."""

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np
from ray.exceptions import RayError

from app.bundle.bundle import Ranking
from app.config.serving import Limits
from app.serving.gateway.auth import ANONYMOUS, Authenticator, Principal
from app.serving.gateway.limits import Limiter
from app.serving.http import JSON, Refused, Request
from app.serving.logs import log
from app.serving.protocols import explain
from app.serving.protocols.contract import MAX_UNIT_LENGTH, Answer, Columns, Query
from app.serving.replica.loaded import Loaded
from app.serving.replica.loader import Loader
from app.serving.replica.meters import Meters
from app.serving.replica.recorder import Recorder
from app.serving.replica.shadow import Shadows

RETRY_HEADERS = {"retry-after": "1"}
"""Headers of a refusal that the client may retry after 1 s."""


@dataclass(frozen=True, kw_only=True)
class Services:
    """The parts of a replica that its endpoint uses."""

    model: str
    limits: Limits
    loader: Loader
    shadows: Shadows
    meters: Meters
    authenticator: Authenticator | None = None
    """Check of tokens; None if requests need no token."""
    limiter: Limiter | None = None
    """Rate limit; None if there is none."""
    recorder: Recorder | None = None
    """Recorder of predictions and feedback; None if the endpoint keeps no records."""
    explanation_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(explain.MAX_CONCURRENT)
    )
    """Limit of the explanations that are computed at a time."""


@dataclass
class Call:
    """A request, and what the endpoint has determined so far: the sender, the variant and the unit."""

    request: Request
    services: Services
    loaded: Loaded
    """Traffic that answers the call, also if the replica loads another one after `read_body`."""
    version: str | None = None
    """Version in the path; None if the path has none."""
    action: str = "none"
    """Name of the action, for metrics."""
    principal: Principal | None = None
    """Sender of the request; None until it is authenticated."""
    variant: str = ""
    """Variant that answers; empty until it is chosen."""
    is_forced: bool = False
    """Whether the client requested the variant, by version or by name."""
    unit: str = ""
    """Unit of the request; empty until the variant is chosen."""
    num_rows: int = 0
    received_at: float = 0.0
    """Time at which the query was read, in seconds since the epoch."""
    _started: float = field(default_factory=time.perf_counter)

    @property
    def sender(self) -> Principal:
        """Sender of the request; ANONYMOUS until it is authenticated."""
        return self.principal or ANONYMOUS

    @property
    def seconds(self) -> float:
        """Seconds since the query was read."""
        return time.perf_counter() - self._started

    def forced_variant(self) -> str | None:
        """The variant that the client requests by version in the path or by name in a header; None if none.

        Raises Refused with 404 or 422 if it is not served.
        """
        if self.version is not None:
            for name, number in self.loaded.versions.items():
                if number == self.version:
                    return name
            served = ", ".join(self.loaded.versions.values())
            raise Refused(
                404,
                f"version {self.version[:20]} of {self.services.model} is not served; these are: {served}",
            )
        name = self.request.header(b"x-raylway-variant")
        if name and name not in self.loaded.versions:
            raise Refused(
                422, f"the header x-raylway-variant must be one of {', '.join(self.loaded.versions)}"
            )
        return name or None

    async def read_body(self, *media_types: str) -> bytes:
        """Read the whole body. Traffic that is loaded while the body arrives answers the call.

        :param media_types: accepted media types; by default JSON.
        :raises Refused: before the body is read if its type or encoding is not accepted (415) or its declared
            length is too large (413); later if the body itself is too large, too slow or incomplete.
        """
        allowed = media_types or (JSON,)
        media_type = self.request.header(b"content-type", JSON).partition(";")[0].strip().lower()
        if media_type not in allowed or self.request.header(b"content-encoding", "identity") != "identity":
            raise Refused(415, f"the body must be {' or '.join(allowed)}, not compressed")
        body = await self.request.body.read(self.services.limits.max_body_bytes)
        self.loaded = self.services.loader.loaded
        return body

    def choose(self, query: Query) -> None:
        """Choose the variant that answers: the one that the client requests, else the one of the unit.

        Raises Refused if the requested variant is not served, or the unit in the header is too long.
        """
        self.received_at, self._started = time.time(), time.perf_counter()
        forced = self.forced_variant()
        self.unit = query.unit or self._header_unit() or self.request.request_id
        self.variant, self.is_forced = forced or self.loaded.choose(self.unit), forced is not None
        self.num_rows = query.num_rows

    async def predict(self, columns: Columns) -> np.ndarray | Ranking:
        """The chosen variant's prediction for any number of rows, as `Bundle.answer` returns it.

        Raises Refused with 503 if the variant's workers do not answer.
        """
        bundle = self.loaded.bundles.get(self.variant)
        if bundle is not None:
            return bundle.answer(columns)
        try:
            return await self.loaded.workers[self.variant].predict(columns)
        except (TimeoutError, RayError) as error:
            log.error("%s of %s does not answer: %s", self.variant, self.services.model, error)
            raise Refused(
                503, f"{self.variant} does not answer now; try again", headers=RETRY_HEADERS
            ) from None

    def answer(self, prediction: np.ndarray | Ranking) -> Answer:
        """The answer with the chosen variant's prediction."""
        return Answer(
            model=self.services.model,
            variant=self.variant,
            version=self.loaded.versions[self.variant],
            request_id=self.request.request_id,
            probabilities=None if isinstance(prediction, Ranking) else prediction,
            ranking=prediction if isinstance(prediction, Ranking) else None,
        )

    def _header_unit(self) -> str:
        """The header x-raylway-unit; empty if it is missing. Raises Refused with 422 if it is too long."""
        # The guard has checked that it is UTF-8.
        unit = self.request.headers.get(b"x-raylway-unit", b"").decode()
        if len(unit) > MAX_UNIT_LENGTH:
            raise Refused(422, f"the header x-raylway-unit must not exceed {MAX_UNIT_LENGTH} characters")
        return unit
