"""Parsers of options (numbers, times, weights), and the message of a wrong command line."""

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import typer

from app.config.faults import shown
from app.config.section import MAX_NUMBER
from app.errors import UserError

WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""Spelling of a number, as in project files and tables. Python's `float` also accepts 1_0, spaces and digits
of other scripts."""


def number(name: str, low: float, high: float, *, whole: bool = False) -> Callable[[Any], float]:
    """Return a parser of an option that is a number from `low` to `high`. The parser raises UserError."""

    def read(text: Any) -> float:
        text = str(text)
        value = float(text) if (WHOLE if whole else NUMBER).fullmatch(text) else math.nan
        if not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise UserError(f"{name}: must be {kind} from {low:g} to {high:,.12g}; it is {shown(text)}")
        return int(text) if whole else value

    return read


def time(text: Any) -> datetime:
    """Parse a time in ISO 8601; without a zone it is UTC. Returns it in UTC without a zone.

    Raises UserError if the text is no time.
    """
    try:
        parsed = datetime.fromisoformat(str(text))
        return parsed.astimezone(UTC).replace(tzinfo=None) if parsed.tzinfo else parsed
    except (ValueError, OverflowError):
        raise UserError(f"--at: must be a time such as 2026-11-01T12:00:00; it is {shown(text)}") from None


def weights(arguments: Sequence[str]) -> dict[str, float]:
    """Parse weights by variant, such as `--champion 90 --challenger=10`.

    Raises UserError if a name has no number, or a number no name.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise UserError(
            f"{' '.join(arguments)}: must be variants with their weights: --champion 90 --challenger 10"
        )
    return {
        name.removeprefix("--"): number(name, 0, MAX_NUMBER)(value)
        for name, value in zip(names, values, strict=True)
    }


def describe(error: typer.TyperException) -> str:
    """Message for a command line that Typer refuses, in one line; empty if Typer has shown the help
    instead."""
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)  # only usage errors know their command
    if context is None or not text:
        return text and f"{_lower(text)}; see --help"
    command = context.command
    allowed = sorted(getattr(command, "commands", ())) or [p.opts[0] for p in command.get_params(context)]
    path = context.command_path
    return f"{path}: {_lower(text)}; it takes {', '.join(allowed)} (see `{path} --help`)"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
