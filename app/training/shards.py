"""Which rows each rank trains on. Imports little: Ray Train's own actors open it when they start."""

from typing import Any

import ray.data
import ray.train


class ContiguousShards(ray.train.DataConfig):
    """Rank r of n gets the r-th n-th of the rows, always the same ones.

    Ray's streaming split hands blocks to whichever rank asks first, which makes no two runs alike. The
    cuts are made here, before the workers take their CPUs: on a cluster that is full the tasks that cut
    would wait for the workers, and the workers for them.
    """

    def __init__(self, datasets: dict[str, ray.data.Dataset], num_workers: int):
        super().__init__()
        self._parts: dict[str, list[ray.data.Dataset]] = {}
        for name, dataset in datasets.items():
            cuts = [dataset.count() * rank // num_workers for rank in range(1, num_workers)]
            self._parts[name] = dataset.split_at_indices(cuts) if cuts else [dataset]

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{name: self._parts[name][rank].iterator() for name in datasets} for rank in range(world_size)]
