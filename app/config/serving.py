"""The section `serving`: variants, replicas, limits, authentication and TLS of an endpoint."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from app.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


def _absolute(file: str) -> str:
    """Absolute path of a file, since other processes with another working directory read it."""
    # Symbolic links are kept: after a renewal, a link may point to another file.
    return str(Path(file).expanduser().absolute())


def _absolute_unless_url(location: str) -> str:
    return location if location.startswith(("http://", "https://")) else _absolute(location)


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. The only name that counts is localhost: none is resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


File = Annotated[str, AfterValidator(_absolute)]
"""A file, relative to the working directory of the command; made absolute when the project file is read."""


class Workers(Section):
    """A variant's own replicas, for a heavy model such as a text encoder, or one on a GPU. They answer
    waiting requests in batches."""

    min_replicas: NonNegativeInt = 1
    """Minimum number of replicas. With 0, all stop after `idle_s` without requests; the next request waits
    until one has started."""
    max_replicas: PositiveInt = 1
    """Maximum number of replicas."""
    num_cpus: NonNegativeFloat = 1
    """CPUs that each replica reserves on the cluster."""
    num_gpus: NonNegativeFloat = 0
    """GPUs that each replica reserves on the cluster."""
    max_batch_rows: PositiveInt = 64
    """Maximum number of rows computed in one batch."""
    target_ongoing_requests: PositiveFloat = 4
    """Target of the autoscaler: the number of requests in progress per replica."""
    idle_s: NonNegativeFloat = 300
    """Seconds without requests after which all replicas stop, if `min_replicas` is 0."""


class Variant(Section):
    """A registered version that answers a share of the traffic."""

    version: str
    """Registered version to serve: an alias such as `champion`, or a version number."""
    weight: NonNegativeFloat = 0
    """Share of the units, relative to the other variants' weights. A variant with weight 0 is loaded and gets
    no requests."""
    shadow: bool = False
    """Whether the variant gets a copy of every request, and its answers are not returned. A shadow has no
    weight."""
    workers: Workers | None = None
    """The variant's own replicas. null: every replica of the endpoint loads it. A shadow always has its
    own."""

    @model_validator(mode="after")
    def _consistent(self) -> "Variant":
        if self.shadow and self.weight:
            raise ValueError(
                "shadow: a shadow's answers are not returned, so it takes no weight; leave it out"
            )
        return self


class Autoscaling(Section):
    """The number of an endpoint's replicas, by Ray Serve's autoscaler."""

    min_replicas: PositiveInt = 1
    """Minimum number of replicas."""
    max_replicas: PositiveInt = 1
    """Maximum number of replicas."""
    target_load: float = Field(0.6, gt=0, le=1)
    """Target of the autoscaler: the share of its time that a replica is busy."""
    upscale_delay_s: NonNegativeFloat = 0.5
    """Seconds for which the load must stay above the target before replicas are added."""
    downscale_delay_s: NonNegativeFloat = 60
    """Seconds for which the load must stay below the target before replicas are removed."""

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class Limits(Section):
    """The limits on requests and feedback."""

    max_body_bytes: PositiveInt = 1_048_576
    """Maximum size of a request body in bytes; a larger one gets 413."""
    max_rows: int = Field(1024, ge=1, le=1_000_000)
    """Maximum number of rows in a request."""
    requests_per_s: Annotated[float, Field(ge=0.001, le=1_000_000)] | None = None
    """Maximum rate of one principal's requests to this model, over all replicas; more get 429. null: no
    limit."""
    max_wait_s: float = Field(1.0, ge=0.01, le=60)
    """Seconds that a request may wait until a replica takes it; one that would wait longer gets 429."""
    feedback_per_hour: int = Field(10_000, ge=1, le=1_000_000_000)
    """Maximum number of feedback messages per hour of one principal on this model. More are quarantined:
    stored, but not counted."""
    feedback_days: float = Field(30, gt=0, le=36_500)
    """Days after a prediction in which feedback on it is accepted."""


class Issuer(Section):
    """The issuer of accepted tokens: OAuth2 bearer tokens that are JSON Web Tokens (RS256, ES256)."""

    issuer: str
    """Claim `iss` of its tokens."""
    audience: str = "raylway"
    """Claim `aud` of tokens for this endpoint."""
    jwks: Annotated[str, AfterValidator(_absolute_unless_url)]
    """The issuer's public keys as a JSON Web Key Set: a URL or a file."""


Auth = Annotated[
    Annotated[Literal["none", "local"], Tag("word")] | Annotated[Issuer, Tag("issuer")],
    Discriminator(lambda value: "issuer" if isinstance(value, dict | Issuer) else "word"),
]


class Tls(Section):
    """HTTPS, with files in PEM format."""

    certificate: File
    """Server certificate, followed by its intermediate certificates."""
    key: File
    """Private key of the certificate."""


class Serving(Section):
    """The endpoint under `/v2/models/<name>`."""

    host: str = "127.0.0.1"
    """Network interface to listen on: an address of this machine, or a name for one. Beyond loopback it needs
    `auth`. All endpoints of a cluster must have the same `host`, `port`, `grpc_port`, `tls`
    and `connections_per_address`."""
    port: int = Field(8000, ge=1, le=65535)
    """TCP port for HTTP, or HTTPS with `tls`."""
    grpc_port: int | None = Field(None, ge=1, le=65535)
    """TCP port for the Open Inference Protocol over gRPC. null: no gRPC."""
    connections_per_address: int | None = Field(1024, ge=1)
    """Maximum number of open connections per client address (IPv6: per /64 network); more are closed before
    they are read. Behind a load balancer or address translation all clients share one address: set null (no
    limit) here, and limit clients there. The gRPC server counts as one client."""
    salt: str = "1"
    """Salt of the hash that assigns units to variants. Change it to start a new experiment."""
    policy: Literal["weighted", "bandit"] = "weighted"
    """weighted: the weights stay as set. bandit: the weights move to the variant whose feedback has the
    better reward (Thompson sampling)."""
    variants: dict[str, Variant] = Field(min_length=1)
    """Versions that answer, by name. At least one has a weight above 0."""
    follow: bool = False
    """Whether the endpoint loads a version as soon as it gets an alias that `variants` names."""
    autoscaling: Autoscaling = Autoscaling()
    """The number of replicas."""
    num_cpus: NonNegativeFloat = 0.5
    """CPUs that each replica reserves on the cluster."""
    limits: Limits = Limits()
    """The limits on requests and feedback."""
    auth: Auth = "none"
    """Required tokens. none: no token, on loopback only. local: tokens of `raylway token`. Else an issuer."""
    tls: Tls | None = None
    """Certificate for HTTPS. null: plain HTTP."""
    trusted_keys: list[File] = Field([])
    """PEM files of Ed25519 public keys. If there are any, only bundles that one of them has signed (`raylway
    sign`) are served."""
    record: bool = True
    """Whether predictions are recorded, for feedback, experiments and drift."""
    log_requests: bool = False
    """Whether all requests are logged; otherwise only those that are refused or fail."""

    @model_validator(mode="after")
    def _consistent(self) -> "Serving":
        if not any(variant.weight for variant in self.variants.values()):
            raise ValueError("variants: at least one must have a weight above 0")
        if self.auth == "none" and not _is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached from other machines, so `auth` must be local or an issuer"
            )
        return self
