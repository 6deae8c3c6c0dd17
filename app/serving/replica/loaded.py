"""A traffic that a replica has loaded: its variants, opened and verified, and their common schema."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.bundle.bundle import ITEMS, OUTPUT, SCORES, Bundle, Ranking
from app.bundle.schema import Schema, schema_at
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.protocols.explain import Walks, load_walks
from app.serving.replica.workers import WorkerHandle
from app.serving.traffic import routing
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import common_schema, open_bundles


class Loaded:
    """A traffic whose bundles are verified and reproduce their stored examples.

    It never changes: to serve another traffic, a replica replaces it between two requests.
    """

    def __init__(
        self,
        traffic: Traffic,
        max_rows: int,
        previous: "Loaded | None" = None,
        trusted_keys: Sequence[str] = (),
    ):
        """Bundles that `previous` has opened are reused.

        Raises UserError if a bundle is broken, or the variants take different inputs.
        """
        self.traffic = traffic
        reusable = {bundle.path: bundle for bundle in previous.bundles.values()} if previous else {}
        local = {name: v for name, v in traffic.variants.items() if v.workers is None}
        opened = open_bundles({name: v for name, v in local.items() if v.path not in reusable}, trusted_keys)
        self.bundles: dict[str, Bundle] = {
            name: reusable[v.path] if v.path in reusable else opened[name] for name, v in local.items()
        }
        """Bundles of the variants that this replica predicts itself, by variant."""
        self.workers = {name: WorkerHandle(v.workers) for name, v in traffic.variants.items() if v.workers}
        """Workers of the other variants, by variant."""
        self.versions = {name: v.version for name, v in traffic.variants.items() if not v.shadow}
        """Versions of the variants that are not shadows, by variant."""
        self.schema = common_schema({name: schema_at(v.path) for name, v in traffic.variants.items()})
        self.contract = Contract(self.schema, max_rows)
        self.weights = traffic.weights
        """Weights of the variants that answer clients, by variant."""
        self._walks: dict[str, Walks] = {}

    def choose(self, unit: str) -> str:
        """The variant that answers a unit."""
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return routing.choose(unit, self.traffic.salt, self.weights)

    def attribution_walks(self, variant: str) -> Walks:
        """The walks that `/explain` uses for a variant. Raises Refused unless its model is tabular."""
        if variant not in self._walks:
            self._walks[variant] = load_walks(self.traffic.variants[variant].path, self.schema)
        return self._walks[variant]

    def example(self) -> dict[str, Any]:
        """The first row of the first variant's stored example, and the answer to it."""
        variant = self.traffic.variants[next(iter(self.weights))]
        stored = json.loads((variant.path / "example.json").read_text())
        answer = Answer(model="", variant="", version="", request_id="", **_outputs(self.schema, stored))
        return {"row": stored["rows"][0], "answer": rows.predictions(answer, self.schema)}

    def metadata(self, name: str, version: str | None) -> bytes:
        """Metadata of the model in the Open Inference Protocol, for one version or for all."""
        return tensors.metadata(name, [version] if version else list(self.versions.values()), self.schema)


def _outputs(schema: Schema, stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of an Answer for the first row of a stored example."""
    if schema.task != "ranking":
        return {"probabilities": np.array(stored[OUTPUT][:1], dtype=np.float32)}
    items, scores = np.array(stored[ITEMS][:1], dtype=object), np.array(stored[SCORES][:1], dtype=np.float32)
    return {"ranking": Ranking(items, scores, np.array([True]))}
