"""Overrides of Ray Train's private methods, and which of them Ray has called in this process.

An override that a new version of Ray no longer calls has no effect and raises no error. `override` marks each
of them, and `not_called` finds those that had no effect.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, ParamSpec, TypeVar

from app.state import hooks

Caller = Literal["driver", "controller", "elastic controller"]
P = ParamSpec("P")
T = TypeVar("T")

_overrides: defaultdict[Caller, set[str]] = defaultdict(set)
_called: set[str] = set()


def override(caller: Caller) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a method that Ray must call in each training; `caller` is the process that calls it."""

    def mark(method: Callable[P, T]) -> Callable[P, T]:
        name = method.__qualname__
        _overrides[caller].add(name)

        @functools.wraps(method)
        def marked(*args: P.args, **kwargs: P.kwargs) -> T:
            _called.add(name)
            return method(*args, **kwargs)

        return marked

    return mark


def not_called(*callers: Caller) -> list[str]:
    """Names of the overrides of these callers that Ray has not called in this process."""
    return sorted(name for caller in callers for name in _overrides[caller] - _called)


def report(names: Sequence[str], on_note: Callable[[str], None]) -> None:
    """Log overrides that Ray did not call during a training, pass a line to `on_note`, and record them.

    `raylway status` shows the record. Without names, removes an earlier record.
    """
    hooks.report("training", [f"Ray Train did not call {name}" for name in names])
    if names:
        note = (
            f"Ray Train did not call {', '.join(names)}: workers start later or are not resized, and a "
            "signal may end the training without a checkpoint; install the versions in pyproject.toml "
            "(`make setup`)"
        )
        logging.getLogger(__name__).warning(note)
        on_note(note)
