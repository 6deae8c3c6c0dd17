"""The frontend of a cluster: the address, port, certificate and gRPC port that all endpoints share.

One HAProxy serves all endpoints of a cluster. `serve` therefore refuses an endpoint whose project file asks
for another frontend than the deployed endpoints have, so that no endpoint is reachable in a way that its own
project file does not allow.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway import preflight

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
"""Loopback address by IP version."""


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """The side of the gateway that clients connect to."""

    host: str
    """Numeric IP address to listen on."""
    port: int
    certificate: str | None
    """Path of the server certificate; None without TLS."""
    key: str | None
    """Path of the certificate's private key; None without TLS."""
    grpc_port: int | None
    """Port of the gRPC server; None if there is none."""
    connections_per_address: int | None = None
    """Maximum number of connections per client address; None for no limit."""

    @property
    def url(self) -> str:
        """URL of the server for clients on this machine."""
        address = ipaddress.ip_address(self.host)
        host = LOOPBACK[address.version] if address.is_unspecified else self.host
        return f"{'https' if self.certificate else 'http'}://{bracketed(host)}:{self.port}"


@dataclass(frozen=True)
class Backend:
    """The settings of an endpoint that the gateway applies."""

    issuer: Issuer | None
    """Issuer of the tokens that the endpoint accepts; None if it requires no tokens."""
    max_wait_s: float
    """Maximum time for which a request waits for a replica."""
    max_body_bytes: int

    @property
    def secured(self) -> bool:
        """Whether the endpoint requires a token."""
        return self.issuer is not None

    def merged(self, previous: "Backend") -> "Backend":
        """Settings for the transition, while replicas with these and with the previous settings answer."""
        max_body_bytes = max(self.max_body_bytes, previous.max_body_bytes)
        return Backend(
            self.issuer if self.issuer == previous.issuer else None, self.max_wait_s, max_body_bytes
        )


@dataclass(frozen=True)
class Gateway:
    """The frontend of a cluster and the endpoints behind it."""

    frontend: Frontend
    backends: Mapping[str, Backend] = field(default_factory=dict)
    """Endpoints by name. An endpoint is added before it is deployed."""


def frontend_of(serving: Serving) -> Frontend:
    """The frontend of a project file. Raises UserError if the host is not an address of this machine."""
    tls = serving.tls
    return Frontend(
        host=preflight.resolve_host(serving.host),
        port=serving.port,
        certificate=tls.certificate if tls else None,
        key=tls.key if tls else None,
        grpc_port=serving.grpc_port,
        connections_per_address=serving.connections_per_address,
    )


def require_compatible(
    current: Gateway | None,
    name: str,
    requested: Frontend,
    secured: bool,
    num_nodes: int,
    deployed: set[str],
) -> None:
    """Raise UserError unless the endpoint `name` may be served with the `requested` frontend.

    `current` is the gateway of the cluster, `secured` whether the endpoint requires tokens, and `deployed`
    are the endpoints that Ray Serve runs.
    """
    _require_safe_address(name, ipaddress.ip_address(requested.host), secured, num_nodes)
    others = sorted(deployed - {name})
    if current is None:
        if deployed:
            raise UserError(
                f"{', '.join(sorted(deployed))} runs on this cluster without a gateway that this version of "
                "Raylway can read; undeploy it, or restart the cluster"
            )
        return
    if current.frontend.port != requested.port and not others:
        raise UserError(
            f"serving.port of {name} is {requested.port}, but {name} is served on port "
            f"{current.frontend.port}, which cannot change while it is served; undeploy it first"
        )
    if others and (differences := _differences(requested, current.frontend)):
        raise UserError(
            f"{name} must have the same frontend as {', '.join(others)}, which this cluster serves, but "
            f"{'; '.join(differences)}. Change the project file of {name}, or serve {name} on a cluster "
            "of its own (another RAYLWAY_HOME and port)."
        )


def bracketed(host: str) -> str:
    """A numeric address as it is written before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _require_safe_address(
    name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address, secured: bool, num_nodes: int
) -> None:
    """Raise UserError if requests without tokens could come from other machines, or nodes cannot listen."""
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


def _differences(requested: Frontend, current: Frontend) -> list[str]:
    """The settings in which two frontends differ, as text."""
    settings = {"certificate": "tls", "key": "tls.key"}
    return [
        f"serving.{settings.get(name, name)} is {_text(value)} instead of {_text(getattr(current, name))}"
        for name, value in asdict(requested).items()
        if value != getattr(current, name)
    ]


def _text(value: str | int | None) -> str:
    return "none" if value is None else str(value)
