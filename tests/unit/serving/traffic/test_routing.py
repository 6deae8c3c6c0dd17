from collections import Counter
from math import sqrt

import pytest

from app.serving.traffic.routing import choose

UNITS = [f"user-{i}" for i in range(20_000)]


def assigned(weights, salt="1"):
    return [choose(unit, salt, weights) for unit in UNITS]


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 50, "b": 50},
        {"a": 90, "b": 10},
        {"a": 1, "b": 2, "c": 3},
        {"a": 0.001, "b": 0.003},
        {"a": 99.9, "b": 0.1},
        {"a": 7},
    ],
)
def test_units_are_shared_in_proportion_to_the_weights(weights):
    counts = Counter(assigned(weights))
    for variant, weight in weights.items():
        share = weight / sum(weights.values())
        deviation = sqrt(len(UNITS) * share * (1 - share))
        assert abs(counts[variant] - len(UNITS) * share) <= 4 * deviation


@pytest.mark.parametrize("raised", ["a", "b", "c"])
def test_a_raised_weight_moves_units_only_to_its_variant_and_no_more_than_needed(raised):
    weights = {"a": 50.0, "b": 30.0, "c": 20.0}
    before, after = assigned(weights), assigned(weights | {raised: weights[raised] * 1.5})
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {new for _, new in moved} == {raised}
    assert len(moved) == Counter(after)[raised] - Counter(before)[raised]


def test_a_new_variant_moves_units_only_to_itself():
    two, three = assigned({"a": 1, "b": 1}), assigned({"a": 1, "b": 1, "c": 1})
    assert {new for old, new in zip(two, three, strict=True) if old != new} == {"c"}


def test_only_the_proportions_of_weights_matter_and_not_their_order():
    assert assigned({"a": 3, "b": 1}) == assigned({"b": 0.25, "a": 0.75})


def test_assignments_with_different_salts_are_independent():
    first, second = assigned({"a": 1, "b": 1}, salt="1"), assigned({"a": 1, "b": 1}, salt="2")
    same = sum(x == y for x, y in zip(first, second, strict=True))
    assert abs(same - len(UNITS) / 2) <= 4 * sqrt(len(UNITS) / 4)


def test_a_character_moved_from_the_unit_to_the_salt_gives_an_independent_assignment():
    weights = {"a": 1, "b": 1}
    shifted = [choose(unit[1:], "1u", weights) for unit in UNITS]
    same = sum(x == y for x, y in zip(assigned(weights), shifted, strict=True))
    assert abs(same - len(UNITS) / 2) <= 4 * sqrt(len(UNITS) / 4)


def test_assignments_never_change():
    """A different assignment would move the users of running experiments."""
    weights = {"champion": 50, "challenger": 30, "third": 20}
    units = ["", "user-1", "user-2", "user-3", "user-4", "ü", "日本", "x" * 256]
    variants = [choose(unit, "income-1", weights) for unit in units]
    assert variants[:4] == ["challenger", "champion", "third", "third"]
    assert variants[4:] == ["champion", "challenger", "champion", "champion"]
