"""Which rows each rank trains on, and in which order."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import torch
from torch import Tensor


def read(part: Path, rank: int, size: int) -> pd.DataFrame:
    """The rows of one of `size` ranks: consecutive rows of the Parquet files of a part.

    A rank gets the same rows in each training. (Ray Data's streaming split gives a block to the first rank
    that requests one, so two trainings would differ.) Opens only the files that have rows of this rank.
    """
    files = sorted(part.glob("*.parquet"))
    counts = [parquet.read_metadata(file).num_rows for file in files]
    total = sum(counts)
    first, end = total * rank // size, total * (rank + 1) // size
    pieces, offset = [], 0
    for file, count in zip(files, counts, strict=True):
        start, stop = max(first - offset, 0), min(end - offset, count)
        if start < stop:
            pieces.append(pd.read_parquet(file).iloc[start:stop])
        offset += count
    return pd.concat(pieces, ignore_index=True)


def begin_epoch(seed: int, epoch: int, rank: int, num_rows: int, length: int) -> Tensor:
    """Seed torch's global generator for an epoch, and return the order of a rank's rows, int64 (length,).

    Both depend on seed, epoch and rank alone. If `length` exceeds `num_rows`, the order repeats from its
    start: every rank must make as many steps as the one with most rows, which would otherwise wait for the
    others forever.
    """
    order_seed, global_seed = (int(s) for s in np.random.SeedSequence([seed, epoch, rank]).generate_state(2))
    torch.manual_seed(global_seed)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(order_seed))
    return order.repeat(math.ceil(length / num_rows))[:length]
