"""What the endpoints of a cluster share, because one HAProxy answers for all of them: the interface, the
port, the certificate, and the server for gRPC.

It belongs to the cluster, not to a project: each `serve` is checked against every endpoint that is deployed,
and refused if it asks for another front than theirs. Nothing becomes reachable where its own project file
does not say so.
"""

import contextlib
import hashlib
import ipaddress
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway.haproxy import SETTINGS
from app.state import files
from app.state.home import front_folder

PEMS = "front-*.pem"
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """Where a cluster's endpoints are reached."""

    host: str
    """A numeric address."""
    port: int
    certificate: str | None
    key: str | None
    grpc_port: int | None
    connections_per_address: int | None = None
    """None: no limit."""

    @property
    def url(self) -> str:
        """The server's URL, from this machine."""
        address = ipaddress.ip_address(self.host)
        host = LOOPBACK[address.version] if address.is_unspecified else self.host
        return f"{'https' if self.certificate else 'http'}://{bracketed(host)}:{self.port}"


@dataclass(frozen=True)
class Backend:
    """What the front has to know of an endpoint behind it."""

    issuer: Issuer | None
    """Whose tokens it takes; None if it asks for none."""
    max_wait_s: float
    max_body_bytes: int

    @property
    def secured(self) -> bool:
        """Whether it asks for a token."""
        return self.issuer is not None

    def beside(self, before: "Backend") -> "Backend":
        """What holds while replicas of this and of `before` answer."""
        largest = max(self.max_body_bytes, before.max_body_bytes)
        return Backend(self.issuer if self.issuer == before.issuer else None, self.max_wait_s, largest)


@dataclass(frozen=True)
class Gateway:
    """A cluster's front, and the endpoints behind it."""

    front: Frontend
    endpoints: Mapping[str, Backend] = field(default_factory=dict)
    """By name. An endpoint is written here before it is deployed."""


def frontend_of(serving: Serving) -> Frontend:
    """The front that a project asks for. Raises UserError if the host is no address of this machine."""
    tls = serving.tls
    return Frontend(
        host=_resolved(serving.host),
        port=serving.port,
        certificate=tls.certificate if tls else None,
        key=tls.key if tls else None,
        grpc_port=serving.grpc_port,
        connections_per_address=serving.connections_per_address,
    )


def check(
    held: Gateway | None, name: str, asked: Frontend, secured: bool, num_nodes: int, deployed: set[str]
) -> None:
    """Raise UserError unless `name` may be served behind this front.

    `held` is the cluster's front now, and `deployed` are the models that Ray Serve runs an endpoint for.
    """
    address = ipaddress.ip_address(asked.host)
    if not secured and not address.is_loopback:
        raise UserError(
            f"serving.auth of {name} must be local or an issuer: serving.host, {address}, can be reached "
            "from other machines"
        )
    if not secured and num_nodes > 1:
        raise UserError(
            f"serving.auth of {name} must be local or an issuer: this cluster has several nodes, so requests "
            "cross its network"
        )
    if num_nodes > 1 and not (address.is_loopback or address.is_unspecified):
        raise UserError(
            f"serving.host of {name} must be 0.0.0.0, :: or a loopback address, not {address}: each of the "
            f"cluster's {num_nodes} nodes listens on it"
        )
    others = sorted(deployed - {name})
    if held is None:
        if deployed:
            raise UserError(
                f"{', '.join(sorted(deployed))} runs on this cluster, but not behind a front of this version "
                "of Raylway; take it off, or restart the cluster"
            )
        return
    if held.front.port != asked.port and not others:
        raise UserError(
            f"serving.port of {name} is {asked.port}, but it is served on port {held.front.port}, which does "
            "not change while it is served; take it off first"
        )
    if others and (different := _differences(asked, held.front)):
        raise UserError(
            f"{name} and {', '.join(others)} would be served by one cluster, which has one front, but "
            f"{'; '.join(different)}. Change it in the project file of {name}, or serve {name} on a cluster "
            "of its own (another RAYLWAY_HOME and port)."
        )


def _differences(asked: Frontend, held: Frontend) -> list[str]:
    keys = {"certificate": "tls", "key": "tls.key"}
    pairs = {keys.get(name, name): (value, getattr(held, name)) for name, value in asdict(asked).items()}
    return [
        f"serving.{key} is {'none' if ours is None else ours}, theirs is {'none' if held is None else held}"
        for key, (ours, held) in pairs.items()
        if ours != held
    ]


def read() -> Gateway | None:
    """What holds for this cluster; None if nothing is served."""
    try:
        document = json.loads((front_folder() / SETTINGS).read_text())
    except FileNotFoundError:
        return None
    if "front" not in document:  # of an older version
        return None
    endpoints = {
        name: Backend(**{**values, "issuer": values["issuer"] and Issuer.model_validate(values["issuer"])})
        for name, values in document["endpoints"].items()
    }
    return Gateway(Frontend(**document["front"]), endpoints)


@contextlib.contextmanager
def tried(shared: Gateway) -> Iterator[None]:
    """Let HAProxy go by it from its next reload on; by what was before, if the block fails.

    Raises UserError if a file of the front is gone.
    """
    front, folder = shared.front, front_folder()
    file, pem = folder / SETTINGS, None
    before = file.read_text() if file.exists() else None
    if front.certificate and front.key:
        # HAProxy wants them in one file. A new one for each content: the old one may be needed again.
        try:
            content = f"{Path(front.certificate).read_text()}\n{Path(front.key).read_text()}"
        except OSError as error:
            raise UserError(
                f"the certificate that is served now must be there until another is: {error}; put it back, "
                "or take the endpoints off first (`raylway undeploy`)"
            ) from None
        pem = folder / f"front-{hashlib.sha256(content.encode()).hexdigest()[:16]}.pem"
        files.write(pem, content, mode=0o600)
    document = {
        "host": front.host,
        "pem": pem and str(pem),
        "connections_per_address": front.connections_per_address,
        "front": asdict(front),
        "endpoints": {
            name: {**vars(behind), "issuer": behind.issuer and behind.issuer.model_dump()}
            for name, behind in shared.endpoints.items()
        },
        "max_wait_s": {name: behind.max_wait_s for name, behind in shared.endpoints.items()},
    }
    files.write(file, json.dumps(document), mode=0o600)
    try:
        yield
    except BaseException:
        if before is None:
            forget()
        else:
            files.write(file, before, mode=0o600)
        raise
    for other in folder.glob(PEMS):
        if other != pem:
            other.unlink(missing_ok=True)


def forget() -> None:
    """Nothing is served any more."""
    for file in (front_folder() / SETTINGS, *front_folder().glob(PEMS)):
        file.unlink(missing_ok=True)


def check_files(serving: Serving) -> None:
    """Raise UserError if a file that the project names for TLS or tokens is not there, or is none."""
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


def require_free(host: str, port: int, setting: str) -> None:
    """Raise UserError if somebody listens there: HAProxy would share the port instead of failing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} must be free on {host} for the endpoint ({error.strerror}). Stop what uses it, "
                f"or choose another with {setting}."
            ) from error


def bracketed(host: str) -> str:
    """A numeric address as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _resolved(host: str) -> str:
    """The address to listen on, IPv4 if a name has both."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"serving.host: {host!r} must be an address of this machine: {error.strerror}"
        ) from None
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    with socket.socket(family) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError as error:
            raise UserError(
                f"serving.host: {host!r} must be an address of this machine, such as 127.0.0.1 or 0.0.0.0: "
                f"{error.strerror}"
            ) from None
    return str(address[0])
