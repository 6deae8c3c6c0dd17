"""How the registered versions are served."""

from pydantic import Field, PositiveInt, model_validator

from app.config.section import Section


class Variant(Section):
    """A registered version that answers a share of the traffic."""

    version: str
    """An alias such as `champion`, or a version number."""
    weight: float = Field(gt=0)
    """Share of the units, relative to the other variants' weights."""


class Autoscaling(Section):
    """How many replicas answer, by Ray Serve's autoscaler."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: float = Field(8, gt=0)
    """Requests in progress per replica that the autoscaler aims at."""
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(60, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class Serving(Section):
    """The endpoint under /v2/models/<name>, on the loopback interface."""

    port: int = Field(8000, ge=1, le=65535)
    salt: str = "1"
    """Changes which units fall to which variant; change it to begin a new experiment."""
    variants: dict[str, Variant] = Field(min_length=1)
    autoscaling: Autoscaling = Autoscaling()
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that a replica reserves on the cluster."""
    max_body_bytes: PositiveInt = 1_048_576
    max_rows: PositiveInt = 1024
    """Rows in one request."""
