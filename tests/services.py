"""The services of an endpoint in a unit test: a real bundle, and stand-ins for Ray and the database."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from app.config.serving import Limits
from app.serving.http import Request
from app.serving.replica.call import Call, Services
from app.serving.replica.loaded import Loaded
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from tests.bundles import build

MODEL = "income"
REQUEST_ID = "r-1"


class FixedBody:
    """A body that has arrived; `is_read` is true once it was read."""

    def __init__(self, content: bytes):
        self._content = content
        self.is_read = False

    async def read(self, max_bytes: int) -> bytes:
        self.is_read = True
        return self._content


class Meters:
    """Keeps the observed requests."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def observe(self, request: Any) -> None:
        self.requests.append(request)


@dataclass
class Recorder:
    """Keeps the recorded predictions."""

    predictions: list[Any] = field(default_factory=list)

    def add(self, prediction: Any) -> int:
        self.predictions.append(prediction)
        return 100


@dataclass
class Shadows:
    """Keeps the offered copies."""

    copies: list[Any] = field(default_factory=list)

    def offer(self, copy: Any) -> None:
        self.copies.append(copy)


def loaded(folder: Path, **variants: float) -> Loaded:
    """Variants with these weights, each with another model; their versions are 1, 2, ..."""
    names = variants or {"champion": 1.0}
    deployed = {
        name: DeployedVariant(version=str(number), weight=weight, path=build(folder / name, seed=number))
        for number, (name, weight) in enumerate(names.items(), start=1)
    }
    return Loaded(Traffic(salt="1", policy="weighted", variants=deployed), max_rows=8)


def services(variants: Loaded, **parts: Any) -> Services:
    """The services of an endpoint without a recorder; `parts` replaces or adds services."""
    defaults: dict[str, Any] = {
        "model": MODEL,
        "limits": Limits(max_rows=8),
        "loader": SimpleNamespace(loaded=variants),
        "shadows": Shadows(),
        "meters": Meters(),
    }
    return Services(**{**defaults, **parts})


def request(action: str = "/predict", body: bytes = b"", method: str = "POST", **headers: str) -> Request:
    """A request to an action of the model. In the names of headers, _ stands for -."""
    return Request(
        method=method,
        path=f"/v2/models/{MODEL}{action}",
        headers={name.replace("_", "-").encode(): value.encode() for name, value in headers.items()},
        body=FixedBody(body),
        request_id=REQUEST_ID,
    )


def call(services: Services, body: bytes = b"", **headers: str) -> Call:
    """A call that has been routed and authenticated."""
    return Call(request("/predict", body, **headers), services, services.loader.loaded)


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)
