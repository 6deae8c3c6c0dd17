import itertools

import pandas as pd
import pytest
import torch

from app.training import shards

LAYOUTS = {"one file": [17], "even": [5, 5, 5], "uneven": [1, 9, 2, 7], "with empty ones": [0, 6, 0, 0, 5, 0]}


@pytest.fixture(params=LAYOUTS.values(), ids=list(LAYOUTS))
def part(request, tmp_path):
    """A part of numbered rows in files."""
    first = 0
    for i, count in enumerate(request.param):
        frame = pd.DataFrame({"row": range(first, first + count), "name": [f"r{i}"] * count})
        frame.to_parquet(tmp_path / f"{i:03d}.parquet")
        first += count
    return tmp_path, first


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 11])
def test_every_row_is_read_by_exactly_one_rank_in_order(part, size):
    folder, total = part
    pieces = [shards.read(folder, rank, size) for rank in range(size)]
    assert pd.concat(pieces)["row"].tolist() == list(range(total))
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert all(piece.index.tolist() == list(range(len(piece))) for piece in pieces)


def test_a_rank_opens_only_the_files_with_its_rows(tmp_path, monkeypatch):
    for i in range(6):
        pd.DataFrame({"row": range(4 * i, 4 * i + 4)}).to_parquet(tmp_path / f"{i}.parquet")
    opened, read = [], pd.read_parquet
    monkeypatch.setattr(pd, "read_parquet", lambda file: (opened.append(file.stem), read(file))[1])
    assert shards.read(tmp_path, 1, 4)["row"].tolist() == [6, 7, 8, 9, 10, 11]
    assert opened == ["1", "2"]


# The order of an epoch


def test_an_epoch_is_determined_by_seed_epoch_and_rank():
    keys = list(itertools.product(range(3), repeat=3))
    orders = {key: shards.begin_epoch(*key, num_rows=50, length=50) for key in keys}
    for key in keys:
        torch.rand(3)  # whatever was drawn before
        assert torch.equal(shards.begin_epoch(*key, num_rows=50, length=50), orders[key])
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(keys)


def test_the_global_generator_is_seeded_by_seed_epoch_and_rank_too():
    def drawn(*key: int) -> tuple[float, ...]:
        shards.begin_epoch(*key, num_rows=5, length=5)
        return tuple(torch.rand(4).tolist())

    keys = list(itertools.product(range(2), repeat=3))
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in keys] == first
    assert len(set(first)) == len(keys)


@pytest.mark.parametrize(("num_rows", "length"), [(10, 10), (10, 12), (3, 10), (1, 4), (10, 4)])
def test_an_order_has_every_row_once_and_then_starts_again(num_rows, length):
    order = shards.begin_epoch(0, 0, 0, num_rows, length).tolist()
    assert len(order) == length
    assert len(set(order[:num_rows])) == min(num_rows, length)
    assert all(0 <= row < num_rows for row in order)
    assert order[num_rows:] == order[: length - num_rows][: max(0, length - num_rows)]
