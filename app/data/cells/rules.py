"""Rules of a column's contract: their wording, and the rows of a table that break them."""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from app.config import Number

MAX_MAGNITUDE = 1e100
"""Largest magnitude of a number, so that sums, spans and variances over a table stay finite."""
MAX_SHOWN_VALUES = 20
"""Maximum number of allowed values that a rule lists."""

NOT_MISSING = "must not be missing"
IS_NUMBER = "must be a number"
IS_STRING = "must be a string"
IS_UNICODE = "must be valid Unicode"
MAGNITUDE = f"must be between -{MAX_MAGNITUDE:g} and {MAX_MAGNITUDE:g}"


class BrokenRule(ValueError):
    """A cell breaks its contract; the message is the rule, such as "must be at most 120"."""


class Fault(NamedTuple):
    """A rule of a column that some rows break."""

    rule: str
    mask: np.ndarray
    """Rows that break the rule, bool (rows,)."""


Faults = list[Fault]


def range_rule(contract: Number, number: float) -> str:
    """The rule that a number outside its contract's range breaks."""
    if number in (np.inf, -np.inf):
        return "must be finite"
    if contract.min is not None and number < contract.min:
        return f"must be at least {contract.min:.15g}"
    if contract.max is not None and number > contract.max:
        return f"must be at most {contract.max:.15g}"
    return MAGNITUDE


def values_rule(allowed: list[str]) -> str:
    """The rule that a category outside its allowed values breaks."""
    if not allowed:
        return "must be missing: training saw no value in this column"
    num_hidden = len(allowed) - MAX_SHOWN_VALUES
    more = f" and {num_hidden} more" if num_hidden > 0 else ""
    return f"must be one of {', '.join(allowed[:MAX_SHOWN_VALUES])}{more}"


def length_rule(max_characters: int) -> str:
    return f"must have at most {max_characters} characters"


def with_value(rule: str, value: Any) -> str:
    """A broken rule with the value that broke it, shortened if it is long."""
    if rule == NOT_MISSING:
        return rule
    if isinstance(value, np.generic):
        value = value.item()
    return f"{rule}, not {'null' if value is None else reprlib.repr(value)}"


def faults_by_row(faults: Mapping[str, Faults], num_rows: int) -> list[list[tuple[str, str]]]:
    """The (column, rule) pairs that each row breaks; `faults` are by column."""
    by_row: list[list[tuple[str, str]]] = [[] for _ in range(num_rows)]
    for column, column_faults in faults.items():
        for rule, mask in column_faults:
            for row in np.flatnonzero(mask):
                by_row[row].append((column, rule))
    return by_row
