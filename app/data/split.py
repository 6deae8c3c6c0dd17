"""Which part a row belongs to: a hash of its content, so no order or file layout matters."""

import numpy as np
import pandas as pd

from app.config import Split

PARTS = ("train", "validation", "test")


def assign(frame: pd.DataFrame, split: Split, seed: int) -> np.ndarray:
    """The part of each row, as an index into PARTS, shape (rows,).

    Equal rows fall into the same part, so a duplicate never stands in training and test both.
    """
    # Sorted by name: the order of the contract's columns does not matter either.
    columns = frame[sorted(frame.columns)]
    hashes = pd.util.hash_pandas_object(columns, index=False, hash_key=f"{seed:016d}"[:16]).to_numpy()
    place = hashes.astype(np.float64) / 2.0**64
    return np.digitize(place, [1 - split.validation - split.test, 1 - split.test])
