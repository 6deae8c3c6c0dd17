"""Reading a project file. Every fault is reported with its line, its key, and what is allowed."""

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
"""Maximum size of a project file."""
MAX_KEYS = 100_000
"""Maximum number of keys and list items in a project file."""
MAX_DEPTH = 50
"""Maximum number of levels of a project file."""
Key = tuple[str, ...]
"""Path of a key, such as (data, columns, age)."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Project:
    """Read a project file.

    `overrides` are strings `a.b=c` whose value is YAML; they replace or add a key. Plain values follow YAML
    1.2: `no` is text, 010 is 10; where text is required, 1 is the text "1".

    Raises UserError, which names every fault with its path, its line, and what is allowed.
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
        raise UserError(f"{path}: must not exceed {MAX_BYTES:,} bytes; this is not a project file")
    document, lines, texts = _parsed(text, str(path))
    if not isinstance(document, dict):
        raise UserError(
            f"{path}: must be a mapping with the keys {_listed(Project.model_fields)}; it is empty or a list"
        )
    overridden = []
    for text in overrides:
        key, scalars = _override(document, text)
        overridden.append(key)
        texts |= scalars
    try:
        project = _validated(document, texts)
    except ValidationError as error:
        messages = [_fault(path, lines, overridden, texts, fault) for fault in error.errors()]
        raise UserError("\n".join(messages)) from None
    for key, text in texts.items():
        if UNDERSCORED.fullmatch(text) and isinstance(_at(project.model_dump(), key), int | float):
            fault = {"loc": key, "type": "underscored", "input": text}
            raise UserError(_fault(path, lines, overridden, texts, fault))
    return project


UNDERSCORED = re.compile(r"[-+]?[0-9.]+_[0-9._eE+-]*")
"""A number with underscores, which Python and pydantic accept, but YAML 1.2 does not."""
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
"""Patterns of plain scalars in YAML 1.2's core schema; a scalar that matches none is text."""


class _Loader(yaml.SafeLoader):
    """Loader for YAML 1.2's core schema. PyYAML's own is 1.1, where no is false, 1:30 is 90 and 010 is 8."""

    # None: patterns that are tried for any first character.
    yaml_implicit_resolvers = {  # noqa: RUF012
        None: [(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{p})$")) for tag, p in SCALARS.items()]
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read keys as text, so that 2013 is the same key as "2013"."""
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    yaml_constructors = {  # noqa: RUF012
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:int": construct_yaml_int,
    }


def _validated(document: dict[str, Any], texts: Mapping[Key, str]) -> Project:
    """The validated project. Where text is required, a number or boolean becomes the text in the file."""
    try:
        return Project.model_validate(document)
    except ValidationError as error:
        for fault in error.errors():
            key, _ = faults.resolve(Project, fault["loc"])
            if fault["type"] == "string_type" and isinstance(fault["input"], int | float) and key in texts:
                parent = _at(document, key[:-1])
                parent[int(key[-1]) if isinstance(parent, list) else key[-1]] = texts[key]
    return Project.model_validate(document)


def _parsed(text: str, source: str) -> tuple[Any, dict[Key, int], dict[Key, str]]:
    """A YAML document, the line of each key and item, and the text of each scalar, by their paths.

    `source` names the document in messages. Raises UserError if it is not valid YAML, or is too large.
    """
    try:
        # Count the keys before constructing the document: aliases of aliases make it grow exponentially.
        lines, texts = _index(yaml.compose(text, Loader=_Loader), source)
        return yaml.load(text, Loader=_Loader), lines, texts
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        hint = "; put text that starts with such a character in quotes" if "any token" in str(error) else ""
        raise UserError(f"{source}: is not valid YAML: {error}{hint}") from None
    except RecursionError:
        raise UserError(f"{source}: must not be nested deeper than {MAX_DEPTH} levels") from None


def _at(document: Any, key: Key) -> Any:
    """The value at a path; None if there is no such path."""
    for part in key:
        if isinstance(document, list | tuple):
            document = document[int(part)]
        elif isinstance(document, dict):
            document = document.get(part)
        else:
            return None
    return document


def _index(node: yaml.Node | None, source: str) -> tuple[dict[Key, int], dict[Key, str]]:
    """The line of each key and the text of each scalar, by path.

    Raises UserError for a key that occurs twice, and beyond MAX_KEYS or MAX_DEPTH.
    """
    lines: dict[Key, int] = {}
    texts: dict[Key, str] = {}

    def add(path: Key, line: int) -> None:
        if path in lines:
            raise UserError(
                f"{source}:{line}: {'.'.join(path)}: must occur once; keep this one or line {lines[path]}"
            )
        if len(lines) >= MAX_KEYS:
            raise UserError(
                f"{source}:{line}: must not have more than {MAX_KEYS:,} keys, aliases written out"
            )
        if len(path) > MAX_DEPTH:
            raise UserError(f"{source}:{line}: must not be nested deeper than {MAX_DEPTH} levels")
        lines[path] = line

    def walk(node: yaml.Node | None, path: Key) -> None:
        if isinstance(node, yaml.ScalarNode):
            texts[path] = node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                child = (*path, str(key.value))
                add(child, key.start_mark.line + 1)
                walk(value, child)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                add((*path, str(i)), item.start_mark.line + 1)
                walk(item, (*path, str(i)))

    walk(node, ())
    return lines, texts


def _override(document: dict[str, Any], text: str) -> tuple[Key, dict[Key, str]]:
    """Apply one `a.b=c` to the document; returns its path, and the text of each scalar by path."""
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise UserError(f"--set {text}: must be of the form key.key=value, such as training.epochs=3")
    parsed, _, texts = _parsed(value, f"--set {key}")
    parent: Any = document
    for part in path[:-1]:
        parent = parent.setdefault(part, {})
        if not isinstance(parent, dict):
            raise UserError(f"--set {text}: {part!r} is a value, so it has no keys")
    parent[path[-1]] = parsed
    return path, {(*path, *child): scalar for child, scalar in texts.items()}


def _fault(
    path: Path, lines: Mapping[Key, int], overridden: list[Key], texts: Mapping[Key, str], error: Any
) -> str:
    """Message for a fault, one line: file and line, key, what is wrong, what is allowed."""
    loc, allowed = faults.resolve(Project, error["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 1)
    where = "--set" if any(loc[: len(o)] == o for o in overridden) else f"{path}:{line}"
    match error["type"]:
        case "extra_forbidden":
            similar = difflib.get_close_matches(loc[-1], allowed, 1)
            hint = f" (did you mean {similar[0]}?)" if similar else ""
            message = f"unknown key{hint}; allowed: {_listed(allowed)}"
        case "missing":
            message = f"is missing; the keys here are {_listed(allowed)}"
        case "value_error":
            message = str(error["ctx"]["error"])
            # A check of the whole file names its key in the message.
            key = loc or tuple(message.partition(":")[0].split("."))
            line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), 1)
            # Several keys are involved, so an overridden key below may be at fault.
            where = "--set" if any(key[: len(o)] == o[: len(key)] for o in overridden) else f"{path}:{line}"
        case _:
            message = faults.describe(error)
            if error["type"] == "string_type" and error["input"] is None:
                message += f'; to give it as text, put it in quotes: "{texts.get(loc, "")}"'
    return f"{where}: {'.'.join(loc)}: {message}" if loc else f"{where}: {message}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
