"""What a replica answers with at the moment: the variants, open, and what they all take."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.bundle.bundle import ITEMS, OUTPUT, SCORES, Bundle, Ranking
from app.bundle.schema import Schema, schema_at
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.protocols.explain import Walks, walks
from app.serving.replica.workers import WorkerHandle
from app.serving.traffic import routing
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import common_schema, open_bundles


class Loaded:
    """A traffic with its bundles, verified, and each having answered its own example. Never changes: a
    replica swaps one for the next, between two requests."""

    def __init__(
        self,
        traffic: Traffic,
        max_rows: int,
        before: "Loaded | None" = None,
        trusted_keys: Sequence[str] = (),
    ):
        """Takes over what `before` has open. Raises UserError if a bundle is broken, or they differ."""
        self.traffic = traffic
        kept = {bundle.path: bundle for bundle in before.bundles.values()} if before else {}
        local = {name: v for name, v in traffic.variants.items() if v.workers is None}
        opened = open_bundles({name: v for name, v in local.items() if v.path not in kept}, trusted_keys)
        self.bundles: dict[str, Bundle] = {
            name: kept[v.path] if v.path in kept else opened[name] for name, v in local.items()
        }
        """Those that are in this replica."""
        self.workers = {name: WorkerHandle(v.workers) for name, v in traffic.variants.items() if v.workers}
        self.versions = {name: v.version for name, v in traffic.variants.items() if not v.shadow}
        """Those that answer, or would with a weight."""
        self.schema = common_schema({name: schema_at(v.path) for name, v in traffic.variants.items()})
        self.contract = Contract(self.schema, max_rows)
        self.weights = traffic.weights
        self._walks: dict[str, Walks] = {}

    def choose(self, unit: str) -> str:
        """The variant that answers a unit."""
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return routing.choose(unit, self.traffic.salt, self.weights)

    def walks(self, variant: str) -> Walks:
        """For `/explain`. Raises Refused if this is no table's model."""
        if variant not in self._walks:
            self._walks[variant] = walks(self.traffic.variants[variant].path, self.schema)
        return self._walks[variant]

    def example(self) -> dict[str, Any]:
        """A row that is answered, and what is said to it: the first stored with the first variant."""
        variant = self.traffic.variants[next(iter(self.weights))]
        stored = json.loads((variant.path / "example.json").read_text())
        answer = Answer(model="", variant="", version="", request_id="", **_outputs(self.schema, stored))
        return {"row": stored["rows"][0], "answer": rows.predictions(answer, self.schema)}

    def metadata(self, name: str, version: str | None) -> bytes:
        return tensors.metadata(name, [version] if version else list(self.versions.values()), self.schema)


def _outputs(schema: Schema, stored: dict[str, Any]) -> dict[str, Any]:
    """Of the first row of a stored example."""
    if schema.task != "ranking":
        return {"probabilities": np.array(stored[OUTPUT][:1], dtype=np.float32)}
    items, scores = np.array(stored[ITEMS][:1], dtype=object), np.array(stored[SCORES][:1], dtype=np.float32)
    return {"ranking": Ranking(items, scores, np.array([True]))}
