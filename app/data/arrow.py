"""Types and masks of Arrow columns."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NUMERIC = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
"""Predicates of the types whose values are read as numbers; booleans are read as 0 and 1."""


def value_type(column_type: pa.DataType) -> pa.DataType:
    """Type of a column's values: that of the dictionary, if the column is dictionary-encoded."""
    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def is_string(column_type: pa.DataType) -> bool:
    return (
        pa.types.is_string(column_type)
        or pa.types.is_large_string(column_type)
        or pa.types.is_string_view(column_type)
    )


def is_numeric(column_type: pa.DataType) -> bool:
    """Whether a column of this type is read as numbers; true for a column of nulls too."""
    return pa.types.is_null(column_type) or any(is_type(column_type) for is_type in NUMERIC)


def as_mask(array: pa.Array) -> np.ndarray:
    """A boolean Arrow array as bool (rows,); null is false."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)
