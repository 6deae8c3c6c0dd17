"""A version in replicas of its own: one that is heavy, and so is better asked about several requests at once;
or a shadow, which must not take anything down."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.bundle.bundle import Ranking
from app.serving.traffic.variants import DeployedVariant, open_bundle, with_local_bundles

Columns = Mapping[str, np.ndarray]
TIMEOUT_S = 30.0
TRIES = 3


class Worker:
    """The deployment. What waits while it computes is computed together, next."""

    def __init__(
        self, model: str, variant: DeployedVariant, max_batch_rows: int, trusted_keys: Sequence[str]
    ):
        """Raises UserError, as `app.serving.traffic.variants.with_local_bundles` and `open_bundle`."""
        from ray import serve

        self._bundle = open_bundle(with_local_bundles(model, {"": variant})[""].path, trusted_keys)
        self._max_batch_rows = max_batch_rows
        self._together = serve.batch(
            self._predict_all,
            max_batch_size=max_batch_rows,
            batch_wait_timeout_s=0.0,
            batch_size_fn=lambda requests: sum(_num_rows(columns) for columns in requests),
        )

    def check_health(self) -> None:
        """Called by Serve."""
        self._bundle.check_example()

    async def predict(self, columns: Columns) -> np.ndarray | Ranking:
        """As of the bundle's `predict` or `rank`."""
        num_rows, most = _num_rows(columns), self._max_batch_rows
        if num_rows <= most:
            return await self._together(columns)
        parts = [
            {name: values[first : first + most] for name, values in columns.items()}
            for first in range(0, num_rows, most)
        ]
        return joined(await asyncio.gather(*(self._together(part) for part in parts)))

    async def _predict_all(self, requests: list[Columns]) -> Sequence[np.ndarray | Ranking]:
        joined = {name: np.concatenate([columns[name] for columns in requests]) for name in requests[0]}
        # Beside the event loop, which takes in what comes meanwhile.
        if self._bundle.schema.task == "ranking":
            ranking = await asyncio.to_thread(self._bundle.rank, joined)
            parts = [ranking.items, ranking.scores, ranking.known]
        else:
            parts = [await asyncio.to_thread(self._bundle.predict, joined)]
        ends = np.cumsum([_num_rows(columns) for columns in requests])[:-1]
        given = zip(*(np.split(part, ends) for part in parts), strict=True)
        return [Ranking(*each) if len(each) == 3 else each[0] for each in given]


class WorkerHandle:
    """The way to it."""

    def __init__(self, application: str):
        from ray import serve

        self._handle: Any = serve.get_deployment_handle("worker", app_name=application)

    async def predict(self, columns: Columns) -> np.ndarray | Ranking:
        """Asks another replica if one dies. Raises TimeoutError, or RayError if none is left."""
        from ray.exceptions import RayActorError

        for attempt in range(TRIES):
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return await self._handle.predict.remote(columns)
            except RayActorError:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError


def joined(parts: Sequence[np.ndarray | Ranking]) -> np.ndarray | Ranking:
    """The answers of several requests, one after the other."""
    rankings = [part for part in parts if isinstance(part, Ranking)]
    if not rankings:
        return np.concatenate([part for part in parts if not isinstance(part, Ranking)])
    items, scores, known = zip(*((each.items, each.scores, each.known) for each in rankings), strict=True)
    return Ranking(np.concatenate(items), np.concatenate(scores), np.concatenate(known))


def _num_rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))
