"""Workers: replicas that serve one version for the replicas of an endpoint.

A heavy version has workers, because they predict several requests together. A shadow has workers, so that its
failures do not affect the endpoint.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.bundle.bundle import Ranking
from app.cluster.requirements import require_tested_versions
from app.serving.traffic.variants import DeployedVariant, open_bundle, with_local_bundles

Columns = Mapping[str, np.ndarray]
"""Columns by name; every array has the shape (rows,)."""
TIMEOUT_S = 30.0
"""Timeout of a prediction."""
MAX_ATTEMPTS = 3
"""Maximum number of workers that a prediction is sent to; it is sent to another one if a worker dies."""


class Worker:
    """The Ray Serve deployment. Requests that arrive during a prediction are predicted together next."""

    def __init__(
        self, model: str, variant: DeployedVariant, max_batch_rows: int, trusted_keys: Sequence[str]
    ):
        """Raises UserError, as `app.serving.traffic.variants.with_local_bundles` and `open_bundle`, or if the
        node has another version of Ray or Optuna."""
        from ray import serve

        require_tested_versions()
        path = with_local_bundles(model, {"": variant})[""].path
        self._bundle = open_bundle(path, trusted_keys)
        self._max_batch_rows = max_batch_rows
        self._predict_batched = serve.batch(
            self._predict_batch,
            max_batch_size=max_batch_rows,
            batch_wait_timeout_s=0.0,
            batch_size_fn=lambda requests: sum(_num_rows(columns) for columns in requests),
        )

    def check_health(self) -> None:
        """Raise BrokenBundle if the bundle does not reproduce its stored example. Called by Serve, which then
        replaces the replica."""
        self._bundle.check_example()

    async def predict(self, columns: Columns) -> np.ndarray | Ranking:
        """The bundle's prediction or ranking of any number of rows, as `Bundle.predict` and `Bundle.rank`."""
        num_rows = _num_rows(columns)
        if num_rows <= self._max_batch_rows:
            return await self._predict_batched(columns)
        parts = [
            {name: values[first : first + self._max_batch_rows] for name, values in columns.items()}
            for first in range(0, num_rows, self._max_batch_rows)
        ]
        return concatenate(await asyncio.gather(*(self._predict_batched(part) for part in parts)))

    async def _predict_batch(self, requests: list[Columns]) -> Sequence[np.ndarray | Ranking]:
        columns = concatenate_columns(requests)
        # In a thread, so that the event loop can receive the next requests.
        if self._bundle.schema.task == "ranking":
            ranking = await asyncio.to_thread(self._bundle.rank, columns)
            outputs = [ranking.items, ranking.scores, ranking.known]
        else:
            outputs = [await asyncio.to_thread(self._bundle.predict, columns)]
        ends = np.cumsum([_num_rows(request) for request in requests])[:-1]
        by_request = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [Ranking(*parts) if len(parts) == 3 else parts[0] for parts in by_request]


class WorkerHandle:
    """The client of an application of workers."""

    def __init__(self, application: str):
        from ray import serve

        self._handle: Any = serve.get_deployment_handle("worker", app_name=application)

    async def predict(self, columns: Columns) -> np.ndarray | Ranking:
        """The version's prediction or ranking of any number of rows. Retries with another worker if one dies.

        Raises TimeoutError, or RayError if no worker is left.
        """
        from ray.exceptions import RayActorError

        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return await self._handle.predict.remote(columns)
            except RayActorError:
                if attempt == MAX_ATTEMPTS:
                    raise
        raise AssertionError


def concatenate_columns(requests: Sequence[Columns]) -> dict[str, np.ndarray]:
    """The rows of several requests, one request after the other."""
    return {name: np.concatenate([columns[name] for columns in requests]) for name in requests[0]}


def concatenate(outputs: Sequence[np.ndarray | Ranking]) -> np.ndarray | Ranking:
    """The outputs for several requests, one request after the other."""
    rankings = [output for output in outputs if isinstance(output, Ranking)]
    if not rankings:
        return np.concatenate([output for output in outputs if not isinstance(output, Ranking)])
    return Ranking(
        items=np.concatenate([ranking.items for ranking in rankings]),
        scores=np.concatenate([ranking.scores for ranking in rankings]),
        known=np.concatenate([ranking.known for ranking in rankings]),
    )


def _num_rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))
