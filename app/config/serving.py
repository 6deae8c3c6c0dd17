"""How the registered versions are served."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from app.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


def _absolute(file: str) -> str:
    """A file that other processes read, whose working directory is another one."""
    # Not resolved: a link that leads to another file after a renewal is followed when the file is read.
    return str(Path(file).expanduser().absolute())


def _absolute_unless_url(place: str) -> str:
    return place if place.startswith(("http://", "https://")) else _absolute(place)


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of names that is known of localhost alone, without asking."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


File = Annotated[str, AfterValidator(_absolute)]
"""A file, relative to where the command runs. It becomes absolute when the project file is read."""


class Workers(Section):
    """Replicas of a variant's own, for one that is heavy: an encoder of text, or one on a GPU. They answer
    what waits together."""

    min_replicas: NonNegativeInt = 1
    """At 0 there are none while nobody asks; the first request then waits until one has started."""
    max_replicas: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1
    """Of each: what it reserves on the cluster."""
    num_gpus: NonNegativeFloat = 0
    max_batch_rows: PositiveInt = 64
    """Rows that are computed at once."""
    target_ongoing_requests: PositiveFloat = 4
    """Requests in progress per replica that the autoscaler aims at."""
    idle_s: NonNegativeFloat = 300
    """How long nobody must ask before there are none."""


class Variant(Section):
    """A registered version that answers a share of the traffic."""

    version: str
    """An alias such as `champion`, or a version number."""
    weight: NonNegativeFloat = 0
    """Share of the units, relative to the other variants' weights. At 0 it is loaded and answers nobody."""
    shadow: bool = False
    """Gets a copy of every request, and nobody sees its answers. It has no weight."""
    workers: Workers | None = None
    """Its own replicas; without, it is in every replica of the endpoint. A shadow always has its own."""

    @model_validator(mode="after")
    def _consistent(self) -> "Variant":
        if self.shadow and self.weight:
            raise ValueError("shadow: nobody sees a shadow's answers, so it takes no weight")
        return self


class Autoscaling(Section):
    """How many replicas answer, by Ray Serve's autoscaler."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_load: float = Field(0.6, gt=0, le=1)
    """The share of its time that a replica is busy, as the autoscaler aims at it."""
    upscale_delay_s: NonNegativeFloat = 0.5
    downscale_delay_s: NonNegativeFloat = 60

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class Limits(Section):
    """What a client may ask for."""

    max_body_bytes: PositiveInt = 1_048_576
    max_rows: int = Field(1024, ge=1, le=1_000_000)
    """Rows in one request."""
    requests_per_s: Annotated[float, Field(ge=0.001, le=1_000_000)] | None = None
    """Of one principal to this model, over all replicas; more get 429. None: no limit."""
    max_wait_s: float = Field(1.0, ge=0.01, le=60)
    """How long a request waits for a replica to take it in; one that would wait longer gets 429."""
    feedback_per_hour: int = Field(10_000, ge=1, le=1_000_000_000)
    """Of one principal; more is stored apart, and counts for nothing until somebody looks at it."""
    feedback_days: float = Field(30, gt=0, le=36_500)
    """How long after its prediction feedback is taken."""


class Issuer(Section):
    """Whose tokens are accepted: OAuth2 bearer tokens that are JSON Web Tokens (RS256, ES256)."""

    issuer: str
    """The claim `iss`."""
    audience: str = "raylway"
    """The claim `aud`."""
    jwks: Annotated[str, AfterValidator(_absolute_unless_url)]
    """The issuer's public keys, as a JSON Web Key Set: a URL, or a file."""


Auth = Annotated[
    Annotated[Literal["none", "local"], Tag("word")] | Annotated[Issuer, Tag("issuer")],
    Discriminator(lambda value: "issuer" if isinstance(value, dict | Issuer) else "word"),
]


class Tls(Section):
    """HTTPS, with files in PEM format."""

    certificate: File
    """The certificate and those that certify it."""
    key: File


class Serving(Section):
    """The endpoint under /v2/models/<name>."""

    host: str = "127.0.0.1"
    """The interface that is listened on: an address of this machine, or a name for one. Beyond loopback it
    needs `auth`. All endpoints of a cluster have the same `host`, `port`, `grpc_port`, `tls` and
    `connections_per_address`."""
    port: int = Field(8000, ge=1, le=65535)
    grpc_port: int | None = Field(None, ge=1, le=65535)
    """Where the Open Inference Protocol is also answered over gRPC; None: nowhere."""
    connections_per_address: int | None = Field(1024, ge=1)
    """Connections that one client address may have open at once (of IPv6, one /64 network); more are closed
    before they are read. Behind a load balancer, or where addresses are translated, all clients have one
    address: then limit them there, and set null here, which is no limit. The server for gRPC counts as a
    client."""
    salt: str = "1"
    """Changes which units fall to which variant; change it to begin a new experiment."""
    policy: Literal["weighted", "bandit"] = "weighted"
    """`bandit` moves the weights to the variant whose feedback brings the better reward (Thompson
    sampling)."""
    variants: dict[str, Variant] = Field(min_length=1)
    follow: bool = False
    """Whether a version that gets an alias which `variants` names is taken in at once."""
    autoscaling: Autoscaling = Autoscaling()
    num_cpus: NonNegativeFloat = 0.5
    """CPUs that a replica reserves on the cluster."""
    limits: Limits = Limits()
    auth: Auth = "none"
    """`none` on loopback only; `local` for the tokens of `raylway token`; or an issuer."""
    tls: Tls | None = None
    trusted_keys: list[File] = Field([])
    """PEM files of Ed25519 public keys. If there are any, only bundles that one of them has signed (`raylway
    sign`) are served."""
    record: bool = True
    """Whether predictions are kept, for feedback, experiments and drift."""
    log_requests: bool = False
    """Whether each request is written to the log, and not only those that are refused or fail."""

    @model_validator(mode="after")
    def _consistent(self) -> "Serving":
        if not any(variant.weight for variant in self.variants.values()):
            raise ValueError("variants: at least one must have a weight above 0")
        if self.auth == "none" and not _is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached from other machines, so `auth` must be local or an issuer"
            )
        return self
