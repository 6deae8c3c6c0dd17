import numpy as np
import pytest

from app.serving.protocols.binary import NUMBER_TYPES, pack, pack_strings, unpack


@pytest.mark.parametrize(("datatype", "dtype"), NUMBER_TYPES.items())
def test_numbers_of_every_type_are_decoded_as_they_were_encoded(datatype, dtype):
    values = np.array([[1, 0], [1, 1]], dtype=dtype)
    assert unpack(memoryview(pack(values)), datatype, 4) == [1, 0, 1, 1]


def test_strings_are_decoded_as_they_were_encoded():
    values = np.array([["a", ""], ["Büro", "b" * 300]], dtype=object)
    assert unpack(memoryview(pack(values)), "BYTES", 4) == ["a", "", "Büro", "b" * 300]
    assert pack_strings(["Büro".encode()]) == b"\5\0\0\0B\xc3\xbcro"


def test_any_byte_but_zero_is_true():
    assert unpack(memoryview(b"\0\1\xff"), "BOOL", 3) == [False, True, True]


@pytest.mark.parametrize(
    ("datatype", "content", "message"),
    [
        ("FP64", b"\0" * 15, "buffer size"),
        ("BYTES", b"\1\0\0", "its binary data ends within a length"),
        ("BYTES", b"\4\0\0\0Mal", "its binary data ends within a string"),
        ("BYTES", b"\xff\xff\xff\xff", "its binary data ends within a string"),
        ("BYTES", pack_strings([b"Male", b"\xff"]), "value 1 is not UTF-8"),
    ],
)
def test_malformed_data_raises_value_error(datatype, content, message):
    with pytest.raises(ValueError, match=message):
        unpack(memoryview(content), datatype, 2)


def test_decoding_strings_stops_after_one_value_too_many():
    """A few bytes per value must not become millions of Python objects."""
    assert len(unpack(memoryview(b"\0" * 4_000), "BYTES", 2)) == 3
