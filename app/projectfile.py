"""Reading a project file, so that every fault is told with its line, its key, and what is allowed."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from app.config import Project, faults
from app.errors import UserError

MAX_BYTES = 1_000_000
"""Of a project file."""
MAX_KEYS = 100_000
"""Keys and list items in a project file."""
MAX_DEPTH = 50
"""Levels of a project file."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Project:
    """Read a project file.

    `overrides` are strings `a.b=c` whose value is YAML; they replace or add a key.

    Raises UserError, naming every fault with its path, the line of the file, and what is allowed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such project file; the shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file: {error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: must not exceed {MAX_BYTES:,} bytes; it is no project file")
    document, lines = _parsed(text, str(path))
    if not isinstance(document, dict):
        raise UserError(
            f"{path}: must be a mapping with the keys {_listed(Project.model_fields)}; it is empty or a list"
        )
    overridden = [_override(document, text) for text in overrides]
    try:
        return Project.model_validate(document)
    except ValidationError as error:
        found = [_fault(path, lines, overridden, e) for e in error.errors()]
        raise UserError("\n".join(found)) from None


def _parsed(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """A document in YAML, and the line of each key and item by its path. Raises UserError."""
    try:
        # The keys are counted before the document is made: aliases of aliases make it grow exponentially.
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return yaml.safe_load(text), lines
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date of 99 days
        raise UserError(f"{where}: is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: must not be nested deeper than {MAX_DEPTH} levels") from None


def _lines(node: yaml.Node | None, where: str) -> dict[tuple[str, ...], int]:
    """The line of each key, by its path. Raises UserError at a key that stands twice, and if there are more
    or deeper ones than any project has."""
    lines: dict[tuple[str, ...], int] = {}

    def note(here: tuple[str, ...], line: int) -> None:
        if here in lines:
            raise UserError(
                f"{where}:{line}: {'.'.join(here)}: stands twice; keep this one or line {lines[here]}"
            )
        if len(lines) >= MAX_KEYS:
            raise UserError(f"{where}:{line}: must not have more than {MAX_KEYS:,} keys, aliases written out")
        if len(here) > MAX_DEPTH:
            raise UserError(f"{where}:{line}: must not be nested deeper than {MAX_DEPTH} levels")
        lines[here] = line

    def walk(node: yaml.Node | None, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, str(key.value))
                note(here, key.start_mark.line + 1)
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                note((*at, str(i)), item.start_mark.line + 1)
                walk(item, (*at, str(i)))

    walk(node, ())
    return lines


def _override(document: dict[str, Any], text: str) -> tuple[str, ...]:
    """Apply one `a.b=c` to the document; returns its path."""
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise UserError(f"--set {text}: must be of the form key.key=value, such as training.epochs=3")
    parsed, _ = _parsed(value, f"--set {key}")
    place: Any = document
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {text}: {part!r} is a value, so it has no keys")
    place[path[-1]] = parsed
    return path


def _fault(
    path: Path, lines: dict[tuple[str, ...], int], overridden: list[tuple[str, ...]], error: Any
) -> str:
    """One line for one fault: where, which key, what is wrong, what is allowed."""
    loc, allowed = faults.resolve(Project, error["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 1)
    where = "--set" if any(loc[: len(o)] == o for o in overridden) else f"{path}:{line}"
    match error["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(loc[-1], allowed, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            message = f"unknown key{meant}; allowed: {_listed(allowed)}"
        case "missing":
            message = f"is missing; the keys here are {_listed(allowed)}"
        case "value_error":
            message = str(error["ctx"]["error"])
            key = loc or tuple(message.partition(":")[0].split("."))  # a check of the whole names its key
            line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), 1)
            # It is of several keys, so one that was set below may be at fault.
            where = "--set" if any(key[: len(o)] == o[: len(key)] for o in overridden) else f"{path}:{line}"
        case _:
            message = faults.explained(error)
    return f"{where}: {'.'.join(loc)}: {message}" if loc else f"{where}: {message}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
