"""Batches of texts of like length, so that little is padding."""

import torch
from torch import Tensor

NUM_BATCHES = 50
"""Batches that are sorted by length together: more would pad less and mix less."""


def by_length(lengths: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """An epoch's random order (rows,), rearranged so that every `batch_size` rows are of like length.

    `lengths` (all rows,) in tokens. The rows of `NUM_BATCHES` batches are sorted by length, and these batches
    dealt out in an order that is the same on all ranks: they wait for each other at each step, so the long
    texts of all of them should come at the same one.
    """
    full = len(order) // batch_size * batch_size
    parts = []
    for rows in order[:full].split(NUM_BATCHES * batch_size):
        batches = rows[lengths[rows].argsort(stable=True)].view(-1, batch_size)
        shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(len(batches)))
        parts.append(batches[shuffled.to(rows.device)].flatten())
    return torch.cat([*parts, order[full:]])
