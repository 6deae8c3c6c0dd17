"""Ratios of our figures to a peer's, with their spread over the rounds, and whether the goal holds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Goals = Mapping[str, tuple[float, str]]
"""For each ratio the value to reach, and whether `lower` or `higher` is better."""


def ratio(goals: Goals, name: str, ours: Sequence[float], peers: Sequence[float]) -> dict[str, Any]:
    """Print and return the ratio of the medians; `ours` and `peers` have a figure for each round."""
    value = statistics.median(ours) / statistics.median(peers)
    return entry(goals, name, value, [a / b for a, b in zip(ours, peers, strict=True)])


def entry(goals: Goals, name: str, value: float, by_round: Sequence[float]) -> dict[str, Any]:
    """Print and return a ratio; `low` and `high` are the smallest and largest of a round."""
    goal, better = goals[name]
    holds = value <= goal if better == "lower" else value >= goal
    figures = {"value": value, "low": min(by_round), "high": max(by_round), "goal": goal}
    shown = {k: round(v, 3) for k, v in figures.items()} | {"better": better, "holds": holds}
    print(f"{name}: {shown}")
    return {name: shown}
