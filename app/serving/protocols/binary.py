"""Binary encoding of tensors, as the binary tensor data extension of the Open Inference Protocol defines it.

Values are in row-major order and little-endian. A string is its length in bytes as a uint32, followed by its
bytes in UTF-8.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

NUMBER_TYPES = {
    "FP64": "<f8", "FP32": "<f4", "BOOL": "?",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip
"""Data types of the protocol for numbers, and the numpy types that encode them."""
LENGTH_BYTES = 4
"""Size of the length in front of a string."""


def pack(values: np.ndarray) -> bytes:
    """Encode an array of any shape: numbers, or objects whose `str` is encoded."""
    if values.dtype != object:
        return values.tobytes()
    return pack_strings(str(value).encode() for value in values.ravel())


def pack_strings(values: Iterable[bytes]) -> bytes:
    """Encode strings that are UTF-8 already."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def unpack(content: memoryview, datatype: str, num_values: int) -> list[Any]:
    """Decode numbers as float or bool, or strings as str.

    Reading strings stops after `num_values` + 1: the caller checks the number of values. Raises ValueError if
    `content` is malformed.
    """
    if datatype == "BOOL":
        return (np.frombuffer(content, np.uint8) != 0).tolist()
    if datatype in NUMBER_TYPES:
        return np.frombuffer(content, NUMBER_TYPES[datatype]).astype(np.float64).tolist()
    values: list[Any] = []
    offset = 0
    while offset < len(content) and len(values) <= num_values:
        start = offset + LENGTH_BYTES
        if start > len(content):
            raise ValueError("its binary data ends within a length")
        (length,) = struct.unpack_from("<I", content, offset)
        value = content[start : start + length].tobytes()
        if len(value) < length:
            raise ValueError("its binary data ends within a string")
        try:
            values.append(value.decode())
        except UnicodeDecodeError:
            raise ValueError(f"value {len(values)} is not UTF-8") from None
        offset = start + length
    return values
