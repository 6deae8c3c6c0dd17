"""Bounds of requests that HAProxy, the replicas and the gRPC server apply: sizes, numbers and times.

The program `raylway-haproxy` imports this module at each reload, so the module imports nothing.
"""

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Maximum size of a body; `serving.limits.max_body_bytes` sets a lower limit for an endpoint."""
MAX_CONCURRENT_REQUESTS = 64
"""Number of places of a replica: the requests that HAProxy sends it at a time. Others wait in HAProxy."""
DEFAULT_MAX_WAIT_S = 1.0
"""Time for which a request waits for a place before it gets 429; `serving.limits.max_wait_s` overrides it."""
HEADERS_TIMEOUT_S = 5
"""Time limit for a client to send its headers, and the part of its body that fits HAProxy's buffer."""
CLIENT_TIMEOUT_S = 10
"""Time limit for a client to send more of its body, or to receive more of its response."""
KEEP_ALIVE_TIMEOUT_S = 30
"""Time limit between two requests of a connection."""
RESPONSE_TIMEOUT_S = 120
"""Time limit for a replica to respond, far above the time of a normal request. It frees the place of a
request that hangs."""
