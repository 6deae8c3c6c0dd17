"""HAProxy's configuration: Ray Serve's, edited.

The edits close HAProxy's own ports, set the address and TLS of the frontend, authenticate HAProxy and the
replicas to each other (`app.serving.gateway.proof`), bound what clients send, and queue requests: a replica
gets only as many requests as it has places, and the others wait in HAProxy until they get 429.

HAProxy's own refusals are JSON, like all others. Two have no setting and stay HTML: the parser's 400 for
bytes that are not HTTP, and the 408 for headers that do not arrive in time.
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any

from app.serving.gateway.bounds import (
    CLIENT_TIMEOUT_S,
    DEFAULT_MAX_WAIT_S,
    HEADERS_TIMEOUT_S,
    KEEP_ALIVE_TIMEOUT_S,
    MAX_BODY_BYTES,
    MAX_CONCURRENT_REQUESTS,
    RESPONSE_TIMEOUT_S,
)

MARK = "# edited by Raylway"
"""First line of an edited configuration."""
REQUEST_PROOF_HEADER = "x-raylway-gateway"
"""Header of all requests and health checks, by which HAProxy authenticates itself to a replica."""
RESPONSE_PROOF_HEADER = "x-raylway-replica"
"""Header of all responses, by which a replica authenticates itself to HAProxy."""
REQUEST_PROOF_VARIABLE, RESPONSE_PROOF_VARIABLE = "RAYLWAY_REQUEST_PROOF", "RAYLWAY_RESPONSE_PROOF"
"""Environment variables of HAProxy with the values of the two headers."""
ALLOWED_METHODS = ("GET", "HEAD", "POST")
"""Methods that some path accepts."""
FORWARDED_METHODS = (*ALLOWED_METHODS, "DELETE", "OPTIONS", "PATCH", "PUT")
"""Methods that are forwarded to a replica. The replica refuses those that a path does not allow."""
UNFINISHED_HEADER = "x-raylway-unfinished"
"""Header of an early response: a replica sends it before the body of the request has arrived completely."""
EARLY_STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503)
"""Statuses of early responses."""
EARLY_HEADERS = ("allow", "retry-after", "www-authenticate", "x-request-id")
"""Headers of early responses that are kept, besides their type and length."""
UNAVAILABLE = "no replica can answer now; try again"
"""Error message of 502, 503 and 504."""
READY_RULES = """    # Serve's own proxy would let clients wait until a replica has started.
{alive}    acl is_ready_path path_end /ready
    http-request set-var(txn.answered) bool(true) if is_ready_path{unless}
    http-request return status 503 content-type application/json string '{body}' hdr retry-after 1 \
if is_ready_path{unless}"""
"""Rules that answer an endpoint's path /ready while no replica is up."""


class UnknownConfiguration(ValueError):
    """Serve's configuration has an unknown form, because its template changed: an edit has no place in it."""


def edit(configuration: str, settings: Mapping[str, Any]) -> str:
    """Edit Serve's configuration; an edited configuration is returned unchanged.

    `settings` has `host`, the address to listen on; `pem`, the file with certificate and key, if the frontend
    uses TLS; `connections_per_address`, if connections are limited; and `max_wait_s` by endpoint.

    Raises UnknownConfiguration if an edit has no place in the configuration.
    """
    if MARK in configuration:
        return configuration
    text = f"{MARK}\n{configuration}"
    text = _replace(text, r"^( *bind) :(\d+)$", r"\1 127.0.0.1:\2")  # metrics
    hidden = r"\1 127.0.0.1:\2\n    http-request return status 404"
    text = _replace(text, r"^(listen stats\n *bind) \*:(\d+)$", hidden)
    text = _edit_frontend(text, settings)
    text = _edit_refusals(text)
    max_wait_s = settings.get("max_wait_s", {})
    # While nothing is served, no application has a backend.
    return re.sub(
        r"^backend (?!default_backend$|successor$)(\S+)\n(?: .*\n)*",
        lambda section: _edit_application(section[0], section[1], max_wait_s),
        text,
        flags=re.MULTILINE,
    )


def _edit_frontend(text: str, settings: Mapping[str, Any]) -> str:
    """Set the address, TLS and rules of the frontend, and add the backend `successor`."""
    tls = f" ssl crt {settings['pem']} alpn http/1.1" if settings.get("pem") else ""
    address = _bind_address(settings.get("host", "127.0.0.1"))
    text = _replace(
        text,
        r"^(frontend http_frontend\n *bind) [^ :\n]+:(\d+)$",
        rf"\1 {address}:\2{tls}\n{_connection_rules(settings.get('connections_per_address'))}"
        f"{_request_rules()}",
    )
    text = _replace(text, r"^( *)# Static routing .*$", r"\1use_backend successor if { stopping }\n\g<0>")
    return _replace(text, r"^(?=backend default_backend$)", _successor(text, tls))


def _edit_refusals(text: str) -> str:
    """Replace Serve's refusals and time limits by Raylway's."""
    # Until the deployment for all other paths runs, a 404 would be wrong.
    starting = f"content-type application/json string '{_refusal('the server is starting; try again')}'"
    text = _replace(
        text,
        r"^(backend default_backend\n *http-request return status) 404 .*$",
        rf"\1 503 {starting} hdr retry-after 1",
    )
    text = re.sub(
        r'^( *http-request return status [45]\d\d content-type) text/plain string "(.*)"',
        lambda match: f"{match[1]} application/json string '{_refusal(match[2])}'",
        text,
        flags=re.MULTILINE,
    )
    # Serve's error files would turn the refusal of a request without a replica into a 500 in plain text.
    text = re.sub(r"^ *errorfile 50[234] .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *timeout (client|server|http-request|http-keep-alive|queue) .*\n", "", text, flags=re.M)
    if unknown := re.search(r"^ *(errorfile|http-request return status [45].* text/plain).*$", text, re.M):
        raise UnknownConfiguration(f"Ray Serve's HAProxy configuration has an unknown line: {unknown[0]}")
    return _replace(text, r"^(defaults\n *mode http)$", "\n".join([r"\1", *_defaults()]))


def _edit_application(section: str, name: str, max_wait_s: Mapping[str, float]) -> str:
    """Edit the backend of an application; `max_wait_s` is the time that requests may wait, by endpoint."""
    wait_s = max_wait_s.get(name.removeprefix("http-"), DEFAULT_MAX_WAIT_S)
    rules = "\n".join([_ready_rules(name, section), *_response_rules(wait_s)])
    section = _replace(section, "^ *http-reuse always$", rf"\g<0>\n{rules}")
    check = f'    http-check send hdr {REQUEST_PROOF_HEADER} "${{{REQUEST_PROOF_VARIABLE}}}"'
    section = _replace(section, r"^ *option httpchk .*$", rf"\g<0>\n{check}")
    # Serve's check accepts the 200 of any process.
    proof = f'    http-check expect hdr name {RESPONSE_PROOF_HEADER} value "${{{RESPONSE_PROOF_VARIABLE}}}"'
    section = _replace(section, r"^ *http-check expect .*$", rf"\g<0>\n{proof}")
    return _replace(section, r"^ *default-server .*$", rf"\g<0> maxconn {MAX_CONCURRENT_REQUESTS}")


def _connection_rules(connections_per_address: int | None) -> str:
    """Rules that close the connections of a client beyond its limit, before the TLS handshake."""
    if connections_per_address is None:
        return ""
    return (
        "    stick-table type ipv6 size 10k expire 1m store conn_cur\n"
        # An IPv6 client can choose its address in a /64 network.
        "    tcp-request connection track-sc0 src,ipmask(32,64)\n"
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {connections_per_address} }}\n"
    )


def _request_rules() -> str:
    """Rules of the frontend: refuse paths, methods and bodies that no replica accepts, and add the proof."""
    missing = _refusal("no such path")
    method = _refusal(f"the method must be {', '.join(ALLOWED_METHODS)}")
    large = _refusal(f"the body must not exceed {MAX_BODY_BYTES} bytes")
    return (
        # Serve's own paths name the applications.
        f"    http-request return status 404 content-type application/json string '{missing}'"
        " if { path_beg /-/ } !{ path /-/healthz }\n"
        # The HTTP server of a replica refuses other methods in plain text; CONNECT would open a tunnel.
        f"    http-request return status 405 content-type application/json string '{method}'"
        f' hdr allow "{", ".join(ALLOWED_METHODS)}" if !{{ method {" ".join(FORWARDED_METHODS)} }}\n'
        # A body that is too large is refused before it arrives. (req.hdr_val has 32 bits only.)
        f"    http-request return status 413 content-type application/json string '{large}'"
        f" if {{ req.body_size gt {MAX_BODY_BYTES} }}\n"
        f"    http-request wait-for-body time {HEADERS_TIMEOUT_S}s"
        " if { req.body_size gt 0 } || { req.fhdr(transfer-encoding) -m found }\n"
        # This replaces a header of the client with the same name.
        f'    http-request set-header {REQUEST_PROOF_HEADER} "${{{REQUEST_PROOF_VARIABLE}}}"\n'
    )


def _successor(text: str, tls: str) -> str:
    """The backend that leads to the next HAProxy process, after a reload.

    The old process still has clients' connections, but its configuration has neither the new replicas nor the
    new endpoints.
    """
    bind = re.search(r"^frontend http_frontend\n *bind (?:ipv6@)?(\S+):(\d+)", text, flags=re.MULTILINE)
    assert bind
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(bind[1], bind[1])
    options = " ssl verify none" if tls else ""  # the server is on this machine
    lines = [
        # Another process may have taken the port, and must not learn the proof.
        f"http-request del-header {REQUEST_PROOF_HEADER}",
        "retries 1",
        # The state file of an earlier Serve may have another port, which would override this one.
        "load-server-state-from-file none",
        f"server successor {host}:{bind[2]}{options}",
    ]
    return "\n".join(["backend successor", *(f"    {line}" for line in lines), ""])


def _defaults() -> list[str]:
    """Time limits, and the refusals of HAProxy itself."""
    lines = [
        f"timeout client {CLIENT_TIMEOUT_S}s",
        f"timeout http-request {HEADERS_TIMEOUT_S}s",
        f"timeout http-keep-alive {KEEP_ALIVE_TIMEOUT_S}s",
        f"timeout server {RESPONSE_TIMEOUT_S}s",
        f"timeout queue {DEFAULT_MAX_WAIT_S:g}s",
    ]
    errors = {
        400: "the request must be HTTP",
        408: f"the request must arrive within {HEADERS_TIMEOUT_S} s; send it again",
        500: "the server failed; try again",
    }
    for status, error in errors.items():
        lines.append(f"http-error status {status} content-type application/json string '{_refusal(error)}'")
    for status in (502, 503, 504):
        lines.append(
            f"http-error status {status} content-type application/json string '{_refusal(UNAVAILABLE)}' "
            "hdr retry-after 1"
        )
    return [f"    {line}" for line in lines]


def _response_rules(max_wait_s: float) -> list[str]:
    """Rules of an endpoint's backend: the time to wait, the replica's proof, and early responses."""
    lines = [
        f"timeout queue {round(max_wait_s * 1000)}ms",
        "http-response set-var(txn.answered) bool(true)",
        # A process that took the port of a dead replica may respond until the next health check.
        f'acl proved res.hdr({RESPONSE_PROOF_HEADER}) -m str "${{{RESPONSE_PROOF_VARIABLE}}}"',
        f"http-response return status 502 content-type application/json string '{_refusal(UNAVAILABLE)}'"
        " hdr retry-after 1 if !proved",
        f"http-response del-header {RESPONSE_PROOF_HEADER}",
        # If replicas are up, a 503 of HAProxy itself means that the time to wait is over.
        "http-after-response set-status 429 if { status 503 } !{ var(txn.answered) -m found } { nbsrv gt 0 }",
        # A request occupies its place until its body has arrived, even if it is answered; `return` ends it.
        f"acl unfinished res.hdr({UNFINISHED_HEADER}) -m found",
        "http-response wait-for-body time 1s if unfinished",
        "http-response set-var(txn.refusal) res.body if unfinished",
    ]
    for name in EARLY_HEADERS:
        variable = f"txn.{name.replace('-', '_')}"
        lines.append(f"http-response set-var({variable}) res.hdr({name}) if unfinished")
        # `return` creates a new response, without the headers of the replica's.
        lines.append(
            f"http-after-response set-header {name} %[var({variable})] if {{ var({variable}) -m found }}"
        )
    for status in EARLY_STATUSES:
        lines.append(
            f"http-response return status {status} content-type application/json "
            f"lf-string '%[var(txn.refusal)]' if unfinished {{ status {status} }}"
        )
    return [f"    {line}" for line in lines]


def _ready_rules(name: str, section: str) -> str:
    """Rules of an application's backend that answer the path /ready with 503 while no replica is up."""
    servers = re.findall(r"^ *server (\S+) (?!.* backup$)", section, flags=re.MULTILINE)
    return READY_RULES.format(
        alive="".join(f"    acl alive srv_is_up({name}/{server})\n" for server in servers),
        unless=" !alive" if servers else "",
        body=_refusal("no replica answers now; try again"),
    )


def _bind_address(host: str) -> str:
    """A numeric address in the syntax of HAProxy's `bind`."""
    return host if ipaddress.ip_address(host).version == 4 else f"ipv6@[{host}]"


def _refusal(error: str) -> str:
    """The JSON body of a refusal."""
    return json.dumps({"error": error, "violations": []})


def _replace(text: str, pattern: str, replacement: str) -> str:
    """Replace the only match of `pattern`. Raises UnknownConfiguration unless there is exactly one."""
    replaced, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if count != 1:
        raise UnknownConfiguration(
            f"Ray Serve's HAProxy configuration must match {pattern!r} once, but matches it {count} times"
        )
    return replaced
