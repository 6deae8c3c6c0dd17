"""Messages for faults of values in a project file: what must hold, and what came."""

import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Tag

from app.config.section import Section
from app.errors import UserError

MAPPING = "must be a mapping of keys to values"
WHOLE = "must be a whole number"
REQUIREMENTS = {
    "string_type": "must be text",
    "string_unicode": "must be text",
    "string_too_short": "must have at least {min_length} characters",
    "int_type": WHOLE,
    "int_parsing": WHOLE,
    "int_parsing_size": WHOLE,
    "int_from_float": WHOLE,
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": MAPPING,
    "model_type": MAPPING,
    "model_attributes_type": MAPPING,
    "literal_error": "must be {expected}",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
    "union_tag_not_found": "{discriminator} is missing",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "underscored": "must be a number without underscores",
    "missing": "is missing",
    "extra_forbidden": "unknown key",
}
"""What must hold, by the kind of fault as pydantic names it."""
MAX_SHOWN_CHARACTERS = 80


def describe(fault: Mapping[str, Any]) -> str:
    """Message for one of a ValidationError's `errors()`, without its line and key."""
    kind = fault["type"]
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    context = {name: _rounded(value) for name, value in fault.get("ctx", {}).items()}
    message = REQUIREMENTS.get(kind, "is not a valid value").format(**context)
    if fault["loc"][-1:] == ("[key]",):
        message = f"the key itself {message}"
    if kind == "union_tag_not_found" or isinstance(fault["input"], dict | list):
        return message
    return f"{message}; it is {shown(fault['input'])}"


def shown(value: Any) -> str:
    """A value as YAML, cut off at MAX_SHOWN_CHARACTERS."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value) if isinstance(value, str | int | float) else json.dumps(value, default=str)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number with thousands of digits"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Raise UserError unless `value` is a number from `low` to `high`."""
    if not low <= value <= high:
        raise UserError(f"{name}: must be a number from {low:g} to {high:,.12g}; it is {shown(value)}")


def _rounded(value: Any) -> Any:
    """A limit without a trailing `.0`."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def resolve(annotation: Any, loc: Iterable[str | int]) -> tuple[tuple[str, ...], list[str]]:
    """Path of a fault in the file, and the keys that are allowed beside its last one.

    `loc` is pydantic's location, which also names the members of unions.
    """
    path: list[str] = []
    allowed: list[str] = []
    for part in map(str, loc):
        if part == "[key]":
            continue
        while typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        args = typing.get_args(annotation)
        if typing.get_origin(annotation) in (types.UnionType, typing.Union):
            tagged = [a for a in args if part in _tags(a)]
            if tagged:
                annotation = tagged[0]
                continue
            annotation = next(a for a in args if a is not types.NoneType)
            args = typing.get_args(annotation)
        path.append(part)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            allowed = list(annotation.model_fields)
            field = annotation.model_fields.get(part)
            annotation = field.annotation if field else None
        elif args:
            annotation = args[-1]
            allowed = []
    return tuple(path), allowed


def _tags(annotation: Any) -> tuple[str, ...]:
    """Names of a member of a union in pydantic's locations."""
    if typing.get_origin(annotation) is Annotated:
        return tuple(note.tag for note in typing.get_args(annotation) if isinstance(note, Tag))
    if not (isinstance(annotation, type) and issubclass(annotation, Section)):
        return ()
    field = next(iter(annotation.model_fields.values()))
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
