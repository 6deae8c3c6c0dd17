"""Checks of a project's serving settings against this machine: its addresses, ports and files."""

import json
import socket
import ssl
from pathlib import Path

from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from app.config import Serving
from app.errors import UserError


def check_files(serving: Serving) -> None:
    """Raise UserError if a file of the settings `tls` or `auth` is missing or invalid."""
    if tls := serving.tls:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tls.certificate, tls.key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"serving.tls must name a certificate and its key, in PEM format; {tls.certificate} and "
                f"{tls.key}: {error}"
            ) from None
    if isinstance(serving.auth, str) or serving.auth.jwks.startswith(("http://", "https://")):
        return
    try:
        KeySet.import_key_set(json.loads(Path(serving.auth.jwks).read_text()))
    except (OSError, ValueError, KeyError, TypeError, JoseError) as error:
        raise UserError(
            f"serving.auth.jwks must be a URL or a file with a JSON Web Key Set; {serving.auth.jwks}: {error}"
        ) from None


def require_free_port(host: str, port: int, setting: str) -> None:
    """Raise UserError if a process listens on the port, because HAProxy would share the port with it.

    `setting` is the key of the project file that sets the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} must be free on {host} for the endpoint ({error.strerror}). Stop the process "
                f"that uses it, or choose another port with {setting}."
            ) from error


def resolve_host(host: str) -> str:
    """The numeric address of `serving.host`; IPv4 if a name has both.

    Raises UserError if it is not an address of this machine.
    """
    try:
        candidates = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"serving.host: {host!r} must be an address of this machine: {error.strerror}"
        ) from None
    family, _, _, _, address = min(candidates, key=lambda candidate: candidate[0] != socket.AF_INET)
    with socket.socket(family) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError as error:
            raise UserError(
                f"serving.host: {host!r} must be an address of this machine, such as 127.0.0.1 or 0.0.0.0: "
                f"{error.strerror}"
            ) from None
    return str(address[0])
