"""Request log of a replica: JSON lines in the replica's log file of Ray Serve.

Failed and refused requests are logged; with `serving.log_requests`, all requests are. A line has the request
id that the client gets and, if the request is part of a trace (W3C Trace Context), the trace id.
"""

import logging
import re

from app.serving.http import Request

log = logging.getLogger("ray.serve.raylway")
"""Child of Ray Serve's logger, whose handlers write to the replica's log file."""
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
"""Valid value of the traceparent header: https://www.w3.org/TR/trace-context/#traceparent-header"""


def trace_id(request: Request) -> str | None:
    """Trace id from the traceparent header; None if the header is missing or invalid."""
    match = TRACEPARENT.fullmatch(request.headers.get(b"traceparent", b""))
    return match[1].decode() if match else None


def log_request(
    request: Request, status: int, seconds: float, variant: str, principal: str, error: str | None
) -> None:
    """Log a request that has been answered; fields that are empty or None are left out."""
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
