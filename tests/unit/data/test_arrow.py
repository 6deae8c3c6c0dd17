import pyarrow as pa
import pytest

from app.data.arrow import as_mask, is_numeric, is_string, value_type


@pytest.mark.parametrize("string_type", [pa.string(), pa.large_string(), pa.string_view()])
def test_string_types(string_type):
    assert is_string(string_type)
    assert not is_numeric(string_type)


@pytest.mark.parametrize(
    "number_type", [pa.int8(), pa.uint64(), pa.float16(), pa.decimal128(5), pa.bool_(), pa.null()]
)
def test_number_types(number_type):
    assert is_numeric(number_type)
    assert not is_string(number_type)


@pytest.mark.parametrize("other_type", [pa.timestamp("s"), pa.list_(pa.string()), pa.binary()])
def test_other_types(other_type):
    assert not is_string(other_type)
    assert not is_numeric(other_type)


def test_value_type_of_a_dictionary():
    assert value_type(pa.dictionary(pa.int32(), pa.string())) == pa.string()
    assert value_type(pa.int8()) == pa.int8()


def test_null_is_false_in_a_mask():
    assert as_mask(pa.array([True, None, False])).tolist() == [True, False, False]
