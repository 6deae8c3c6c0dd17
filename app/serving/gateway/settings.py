"""The gateway's settings file, which `serve` writes and `raylway-haproxy` reads at each start and reload."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.serving.gateway.haproxy import SETTINGS_FILE
from app.state import files
from app.state.home import gateway_folder

PEM_FILES = "gateway-*.pem"
"""Pattern of the files that have a certificate and its key, the form that HAProxy requires."""


def read() -> Gateway | None:
    """The gateway of this cluster; None if no endpoint is served, or an earlier version wrote the file."""
    try:
        document = json.loads((gateway_folder() / SETTINGS_FILE).read_text())
    except FileNotFoundError:
        return None
    if "frontend" not in document:
        return None
    backends = {
        name: Backend(**{**values, "issuer": values["issuer"] and Issuer.model_validate(values["issuer"])})
        for name, values in document["endpoints"].items()
    }
    return Gateway(Frontend(**document["frontend"]), backends)


@contextlib.contextmanager
def applied(gateway: Gateway) -> Iterator[None]:
    """Write the settings, which take effect with HAProxy's next reload; restore the previous settings if the
    block raises.

    Raises UserError if the certificate or its key cannot be read.
    """
    file = gateway_folder() / SETTINGS_FILE
    previous = file.read_text() if file.exists() else None
    pem = _write_pem(gateway.frontend)
    files.write(file, json.dumps(_document(gateway, pem)), mode=0o600)
    try:
        yield
    except BaseException:
        if previous is None:
            remove()
        else:
            files.write(file, previous, mode=0o600)
        raise
    for other in gateway_folder().glob(PEM_FILES):
        if other != pem:
            other.unlink(missing_ok=True)


def remove() -> None:
    """Remove the settings, once no endpoint is served."""
    for file in (gateway_folder() / SETTINGS_FILE, *gateway_folder().glob(PEM_FILES)):
        file.unlink(missing_ok=True)


def _write_pem(frontend: Frontend) -> Path | None:
    """Write a file with the certificate and its key; None without TLS.

    Its name depends on the content, so that the previous file stays for HAProxy and for a restore.
    """
    if not (frontend.certificate and frontend.key):
        return None
    try:
        content = f"{Path(frontend.certificate).read_text()}\n{Path(frontend.key).read_text()}"
    except OSError as error:
        raise UserError(
            f"the files of the certificate in use must exist until the endpoints use another one: {error}; "
            "restore them, or undeploy the endpoints first (`raylway undeploy`)"
        ) from None
    pem = gateway_folder() / f"gateway-{hashlib.sha256(content.encode()).hexdigest()[:16]}.pem"
    files.write(pem, content, mode=0o600)
    return pem


def _document(gateway: Gateway, pem: Path | None) -> dict[str, object]:
    """The settings as JSON. `app.serving.gateway.haproxy` reads host, pem, connections_per_address and
    max_wait_s; `read` reads frontend and endpoints."""
    frontend, backends = gateway.frontend, gateway.backends
    return {
        "host": frontend.host,
        "pem": pem and str(pem),
        "connections_per_address": frontend.connections_per_address,
        "frontend": asdict(frontend),
        "endpoints": {
            name: {**vars(backend), "issuer": backend.issuer and backend.issuer.model_dump()}
            for name, backend in backends.items()
        },
        "max_wait_s": {name: backend.max_wait_s for name, backend in backends.items()},
    }
