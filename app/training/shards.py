"""Which rows each rank trains on."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as parquet


def read(part: Path, rank: int, size: int) -> pd.DataFrame:
    """The `rank`-th of `size` runs of consecutive rows, in the order of the files.

    The same rows each time, whoever else is there: Ray Data's streaming split hands blocks to whichever
    rank asks first, which makes no two trainings alike. Each rank opens just the files that have its rows.
    """
    files = sorted(part.glob("*.parquet"))
    counts = [parquet.read_metadata(file).num_rows for file in files]
    total = sum(counts)
    low, high = total * rank // size, total * (rank + 1) // size
    pieces, first = [], 0
    for file, count in zip(files, counts, strict=True):
        start, stop = max(low - first, 0), min(high - first, count)
        if start < stop:
            pieces.append(pd.read_parquet(file).iloc[start:stop])
        first += count
    return pd.concat(pieces, ignore_index=True)
