import pyarrow as pa
import pytest

from app.data.sources.column_types import common_type, family, fits

DICTIONARY = pa.dictionary(pa.int32(), pa.string())
KINDS = ("number", "category", "text", "label", "time")


@pytest.mark.parametrize(
    ("column_type", "kinds"),
    [
        (pa.null(), set(KINDS)),
        (pa.string(), {"category", "text", "label", "time"}),
        (DICTIONARY, {"category", "text", "label", "time"}),
        (pa.int64(), {"number", "label", "time"}),
        (pa.float32(), {"number", "time"}),
        (pa.decimal128(5), {"number"}),
        (pa.bool_(), {"number", "label"}),
        (pa.timestamp("s"), {"time"}),
        (pa.list_(pa.string()), set()),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_kinds_that_a_type_fits(column_type, kinds):
    assert {kind for kind in KINDS if fits(column_type, kind)} == kinds


@pytest.mark.parametrize(
    ("types", "kind", "expected"),
    [
        ([pa.int32(), pa.int32()], "number", pa.int32()),
        ([pa.int32(), pa.float64()], "number", pa.float64()),
        ([pa.int32(), pa.null()], "number", pa.float64()),
        ([pa.bool_(), pa.int8()], "number", pa.float64()),
        ([pa.int32(), pa.int64()], None, pa.int64()),
        ([pa.int32(), pa.float64()], None, pa.string()),
        ([DICTIONARY, pa.large_string()], "category", pa.string()),
        ([pa.date32(), pa.timestamp("ns")], "time", pa.timestamp("us")),
        ([pa.int32(), pa.float64()], "time", pa.float64()),
    ],
    ids=str,
)
def test_common_type_of_files(types, kind, expected):
    assert common_type(types, kind) == expected


def test_types_of_different_families():
    assert family(pa.bool_(), "label") != family(pa.int8(), "label")
    assert family(pa.date32(), "time") == family(pa.timestamp("s"), "time")
    assert family(pa.null(), "number") is None
