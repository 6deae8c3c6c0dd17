"""What a replica writes of its requests: lines of JSON, in the replica's file among Serve's logs.

A request that failed or was refused is written down, and each one if `serving.log_requests` says so. A line
has the request id that the client was told, and the id of its trace if it came with one (W3C Trace Context).
"""

import logging
import re

from app.serving.http import Request

log = logging.getLogger("ray.serve.raylway")
"""Below Serve's own, whose file it goes to."""
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
"""https://www.w3.org/TR/trace-context/#traceparent-header"""


def trace_id(request: Request) -> str | None:
    """Of the trace that a request belongs to; None if it came with none, or with one of another form."""
    found = TRACEPARENT.fullmatch(request.headers.get(b"traceparent", b""))
    return found[1].decode() if found else None


def request_answered(
    request: Request, status: int, seconds: float, variant: str, principal: str, error: str | None
) -> None:
    """Write a request down."""
    fields = {
        "request": request.request_id,
        "trace": trace_id(request),
        "method": request.method,
        "path": request.path,
        "status": status,
        "seconds": round(seconds, 6),
        "variant": variant or None,
        "principal": principal or None,
        "error": error,
    }
    log.info("request", extra={name: value for name, value in fields.items() if value is not None})
