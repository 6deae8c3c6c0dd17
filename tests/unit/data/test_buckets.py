import numpy as np
import pytest
import torch

from app.data.buckets import BATCHES_PER_BUCKET, bucket_by_length

BATCH_SIZE = 8
LENGTHS = torch.randint(2, 60, (1000,), generator=torch.Generator().manual_seed(0))


def random_order(seed: int, num_rows: int = 1000) -> torch.Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def num_padded_tokens(order: torch.Tensor) -> int:
    return sum(len(rows) * int(LENGTHS[rows].max()) for rows in order.split(BATCH_SIZE))


@pytest.mark.parametrize("num_rows", [1000, 990, 7, 8, 1])
def test_every_row_occurs_once(num_rows):
    order = random_order(0, num_rows)
    arranged = bucket_by_length(LENGTHS, order, BATCH_SIZE)
    assert sorted(arranged.tolist()) == sorted(order.tolist())


def test_the_result_depends_on_the_order_alone():
    first = bucket_by_length(LENGTHS, random_order(1), BATCH_SIZE)
    torch.manual_seed(99)
    assert torch.equal(bucket_by_length(LENGTHS, random_order(1), BATCH_SIZE), first)
    assert not torch.equal(bucket_by_length(LENGTHS, random_order(2), BATCH_SIZE), first)


def test_little_is_padding():
    num_tokens = int(LENGTHS.sum())
    assert num_padded_tokens(random_order(0)) > 1.5 * num_tokens
    assert num_padded_tokens(bucket_by_length(LENGTHS, random_order(0), BATCH_SIZE)) < 1.1 * num_tokens


def test_ranks_have_similar_lengths_at_the_same_step():
    orders = [bucket_by_length(LENGTHS, random_order(seed), BATCH_SIZE) for seed in (1, 2)]
    longest = [[int(LENGTHS[rows].max()) for rows in order.split(BATCH_SIZE)] for order in orders]
    differences = np.abs(np.subtract(*longest))
    assert len(differences) == 125 > BATCHES_PER_BUCKET
    assert np.median(differences) <= 3
