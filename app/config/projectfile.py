"""Reading a project file, so that every fault is told with its line, its key, and what is allowed."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
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
Key = tuple[str, ...]
"""The path of a key, such as data, columns, age."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Project:
    """Read a project file.

    `overrides` are strings `a.b=c` whose value is YAML; they replace or add a key. A plain value is what it
    looks like (YAML 1.2): `no` is a text, 010 is 10, and 1 where a text is wanted is the text "1".

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
    document, lines, texts = _parsed(text, str(path))
    if not isinstance(document, dict):
        raise UserError(
            f"{path}: must be a mapping with the keys {_listed(Project.model_fields)}; it is empty or a list"
        )
    overridden = []
    for text in overrides:
        key, written = _override(document, text)
        overridden.append(key)
        texts |= written
    try:
        project = _validated(document, texts)
    except ValidationError as error:
        found = [_fault(path, lines, overridden, texts, e) for e in error.errors()]
        raise UserError("\n".join(found)) from None
    for key, text in texts.items():
        if UNDERSCORED.fullmatch(text) and isinstance(_at(project.model_dump(), key), int | float):
            fault = {"loc": key, "type": "underscored", "input": text}
            raise UserError(_fault(path, lines, overridden, texts, fault))
    return project


UNDERSCORED = re.compile(r"[-+]?[0-9.]+_[0-9._eE+-]*")
"""What Python and Pydantic read as a number, and nobody else."""
SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
    "merge": r"<<",
}
"""What a plain scalar is, by YAML 1.2's core schema; what matches none is a text."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: PyYAML's is 1.1, where no is false, 1:30 is 90 and 010 is 8."""

    # Under None stand those that are tried whatever a scalar begins with.
    yaml_implicit_resolvers = {  # noqa: RUF012
        None: [(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{p})$")) for tag, p in SCALARS.items()]
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are names: 2013 is as good as "2013"."""
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    yaml_constructors = {  # noqa: RUF012
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:int": construct_yaml_int,
    }


def _validated(document: dict[str, Any], texts: Mapping[Key, str]) -> Project:
    """The project, with numbers and booleans where a text is wanted taken as they are written."""
    try:
        return Project.model_validate(document)
    except ValidationError as error:
        for fault in error.errors():
            key, _ = faults.resolve(Project, fault["loc"])
            if fault["type"] == "string_type" and isinstance(fault["input"], int | float) and key in texts:
                place = _at(document, key[:-1])
                place[int(key[-1]) if isinstance(place, list) else key[-1]] = texts[key]
    return Project.model_validate(document)


def _parsed(text: str, where: str) -> tuple[Any, dict[Key, int], dict[Key, str]]:
    """A document in YAML, the line of each key and item, and the text of each scalar, by their paths.

    Raises UserError.
    """
    try:
        # The keys are counted before the document is made: aliases of aliases make it grow exponentially.
        lines, texts = _places(yaml.compose(text, Loader=_Loader), where)
        return yaml.load(text, Loader=_Loader), lines, texts
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        quote = (
            "; a text that begins with such a character goes in quotes" if "any token" in str(error) else ""
        )
        raise UserError(f"{where}: is not valid YAML: {error}{quote}") from None
    except RecursionError:
        raise UserError(f"{where}: must not be nested deeper than {MAX_DEPTH} levels") from None


def _at(document: Any, key: Key) -> Any:
    """The value at a path; None if there is none."""
    for part in key:
        if isinstance(document, list | tuple):
            document = document[int(part)]
        elif isinstance(document, dict):
            document = document.get(part)
        else:
            return None
    return document


def _places(node: yaml.Node | None, where: str) -> tuple[dict[Key, int], dict[Key, str]]:
    """The line of each key and the text of each scalar, by its path. Raises UserError at a key that stands
    twice, and if there are more or deeper ones than any project has."""
    lines: dict[Key, int] = {}
    texts: dict[Key, str] = {}

    def note(here: Key, line: int) -> None:
        if here in lines:
            raise UserError(
                f"{where}:{line}: {'.'.join(here)}: stands twice; keep this one or line {lines[here]}"
            )
        if len(lines) >= MAX_KEYS:
            raise UserError(f"{where}:{line}: must not have more than {MAX_KEYS:,} keys, aliases written out")
        if len(here) > MAX_DEPTH:
            raise UserError(f"{where}:{line}: must not be nested deeper than {MAX_DEPTH} levels")
        lines[here] = line

    def walk(node: yaml.Node | None, at: Key) -> None:
        if isinstance(node, yaml.ScalarNode):
            texts[at] = node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, str(key.value))
                note(here, key.start_mark.line + 1)
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                note((*at, str(i)), item.start_mark.line + 1)
                walk(item, (*at, str(i)))

    walk(node, ())
    return lines, texts


def _override(document: dict[str, Any], text: str) -> tuple[Key, dict[Key, str]]:
    """Apply one `a.b=c` to the document; returns its path, and the text of each scalar by its own."""
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise UserError(f"--set {text}: must be of the form key.key=value, such as training.epochs=3")
    parsed, _, texts = _parsed(value, f"--set {key}")
    place: Any = document
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {text}: {part!r} is a value, so it has no keys")
    place[path[-1]] = parsed
    return path, {(*path, *below): written for below, written in texts.items()}


def _fault(
    path: Path, lines: Mapping[Key, int], overridden: list[Key], texts: Mapping[Key, str], error: Any
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
            if error["type"] == "string_type" and error["input"] is None:
                message += f'; if a text is meant, put it in quotes: "{texts.get(loc, "")}"'
    return f"{where}: {'.'.join(loc)}: {message}" if loc else f"{where}: {message}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
