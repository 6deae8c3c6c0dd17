"""Types of columns: whether a column fits its contract, and the type that it gets in all files."""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from app.data.arrow import is_numeric, is_string, value_type

Kind = Literal["number", "category", "text", "label", "time"]
"""Use of a column. A label with a threshold is a number."""

CONTENT: dict[Kind, str] = {
    "number": "numbers",
    "category": "strings",
    "text": "strings",
    "label": "strings, integers or booleans",
    "time": "timestamps, dates, ISO 8601 text or numbers",
}
"""Values that a column of each kind may have, in words."""


def fits(column_type: pa.DataType, kind: Kind) -> bool:
    """Whether a column of this type may hold values of this kind."""
    column_type = value_type(column_type)
    if pa.types.is_null(column_type):
        return True
    is_integer, is_floating = pa.types.is_integer(column_type), pa.types.is_floating(column_type)
    match kind:
        case "number":
            return is_numeric(column_type)
        case "time":
            is_date = pa.types.is_timestamp(column_type) or pa.types.is_date(column_type)
            return is_string(column_type) or is_integer or is_floating or is_date
        case "label":
            return is_string(column_type) or is_integer or pa.types.is_boolean(column_type)
        case _:
            return is_string(column_type)


def family(column_type: pa.DataType, kind: Kind | None) -> str | None:
    """The family of a type: types of one family mean the same in a column of this kind.

    None for a column of nulls, which fits every family.
    """
    column_type = value_type(column_type)
    if pa.types.is_null(column_type):
        return None
    if is_string(column_type):
        return "text"
    if kind == "number" and is_numeric(column_type):
        return "number"
    if pa.types.is_boolean(column_type):
        return "boolean"
    if pa.types.is_integer(column_type):
        return "number" if kind == "time" else "integer"
    if pa.types.is_floating(column_type):
        return "number"
    return "time" if kind == "time" else str(column_type)


def common_type(types: Sequence[pa.DataType], kind: Kind | None) -> pa.DataType:
    """The type to which a column is cast in all files; `kind` is None for a column outside the contract."""
    if len(set(types)) == 1:
        return types[0]
    families = {name for column_type in types if (name := family(column_type, kind))}
    if families == {"number"}:
        return pa.float64()
    if families == {"integer"} and kind is None:
        return pa.int64()
    return pa.timestamp("us") if families == {"time"} else pa.string()
