"""Bucketing by length: batches of texts of similar length, so that little is padding."""

import torch
from torch import Tensor

BATCHES_PER_BUCKET = 50
"""Number of batches that are sorted by length together. More batches pad less, but mix the rows less."""


def bucket_by_length(lengths: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """Rearrange an epoch's random order (rows,) so that each `batch_size` rows have similar lengths.

    `lengths` (all rows,) are in tokens. The rows of each bucket are sorted by length, and its batches are
    shuffled in the same way on all ranks: ranks wait for each other at each step, so the long texts of all
    ranks should come at the same step.
    """
    full = len(order) // batch_size * batch_size
    parts = []
    for rows in order[:full].split(BATCHES_PER_BUCKET * batch_size):
        batches = rows[lengths[rows].argsort(stable=True)].view(-1, batch_size)
        shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(len(batches)))
        parts.append(batches[shuffled.to(rows.device)].flatten())
    return torch.cat([*parts, order[full:]])
