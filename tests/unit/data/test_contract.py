from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.config import Data
from app.data.contract import Violation, conform, require_no_violations, violation_table
from app.data.split import TIME
from app.errors import UserError

DATA = Data.model_validate(
    {
        "source": {"path": "unused.parquet"},
        "label": {"column": "bought", "positive": "yes"},
        "missing": ["?", "n/a"],
        "columns": {
            "age": {"type": "number", "min": 0, "max": 120},
            "income": {"type": "number", "nullable": True, "min": 1},
            "gender": {"type": "category", "values": ["Female", "Male"]},
            "town": {"type": "category", "nullable": True},
        },
    }
)
GOOD = {
    "age": [30.0, 40.0, 50.0, 60.0],
    "income": [1.0, 2.0, 3.0, 4.0],
    "gender": ["Female", "Male", "Male", "Male"],
    "town": ["a", "b", "c", "d"],
    "bought": ["yes", "no", "no", "yes"],
}


def block(**changed) -> pa.Table:
    return pa.table({**GOOD, **changed})


def violations_of(table: pa.Table) -> dict[tuple[str, str], tuple[int, list[str]]]:
    return {(v.column, v.rule): (v.count, v.examples) for v in conform(table, DATA)[1]}


def test_valid_rows_have_no_violations():
    frame, violations = conform(block(), DATA)
    assert violations == []
    assert frame.to_dict("list") == GOOD


@pytest.mark.parametrize(
    ("column", "values", "rule", "count", "examples"),
    [
        ("age", ["30", "young", "old", "5"], "must be a number", 2, ["'young'", "'old'"]),
        ("age", ["30", "", "40", "5"], "must not be missing", 1, []),
        ("age", ["30", "?", "n/a", "5"], "must not be missing", 2, []),
        ("age", [30.0, None, float("nan"), 40.0], "must not be missing", 2, []),
        ("age", ["30", "nan", "40", "5"], "must not be missing", 1, []),
        ("income", [1.0, float("inf"), -float("inf"), 2.0], "must be finite", 2, ["inf", "-inf"]),
        ("income", ["1", "inf", "2", "3"], "must be finite", 1, ["'inf'"]),
        ("age", [-0.5, 0.0, 120.0, 5.0], "must be at least 0", 1, ["-0.5"]),
        ("age", [121, 0, 120, 150], "must be at most 120", 2, ["121", "150"]),
        ("age", ["121", "0", "120", "7"], "must be at most 120", 1, ["'121'"]),
        ("gender", ["male", "Male", "F", "M"], "must be one of Female, Male", 3, ["'male'", "'F'", "'M'"]),
        ("gender", ["Male", "?", "", None], "must not be missing", 3, []),
        ("bought", ["yes", "?", None, ""], "must not be missing", 3, []),
    ],
)
def test_a_violation_has_the_number_of_rows_and_examples(column, values, rule, count, examples):
    assert violations_of(block(**{column: values}))[column, rule] == (count, examples)


def test_missing_values_of_a_nullable_column_are_valid():
    frame, violations = conform(block(income=["1", "", "?", None], town=["", "?", None, "x"]), DATA)
    assert violations == []
    assert frame["income"].tolist()[:1] == [1.0]
    assert frame["income"].isna().tolist() == [False, True, True, True]
    assert frame["town"].tolist() == [None, None, None, "x"]


def test_all_violations_of_a_block_are_listed():
    table = block(
        age=[-1.0, 200.0, None, 30.0],
        income=["much", "0", "3", "4"],
        gender=["Male", "x", None, "Male"],
        bought=["yes", "?", "no", "no"],
    )
    assert set(violations_of(table)) == {
        ("age", "must be at least 0"),
        ("age", "must be at most 120"),
        ("age", "must not be missing"),
        ("income", "must be a number"),
        ("income", "must be at least 1"),
        ("gender", "must be one of Female, Male"),
        ("gender", "must not be missing"),
        ("bought", "must not be missing"),
    }


def test_only_the_first_examples_are_kept():
    many = conform(block(age=[-1.0, -2.0, -3.0, -4.0]), DATA)[1]
    assert many == [Violation("age", "must be at least 0", 4, ["-1.0", "-2.0", "-3.0"])]


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("age", pa.array([1, 2, 3, 4], pa.int64()), [1.0, 2.0, 3.0, 4.0]),
        ("age", pa.array([1, 2, 3, 4], pa.uint8()), [1.0, 2.0, 3.0, 4.0]),
        ("income", pa.array([1, None, 3, 4], pa.int32()), [1.0, np.nan, 3.0, 4.0]),
        ("age", pa.array([1, 2, 3, 4], pa.float32()), [1.0, 2.0, 3.0, 4.0]),
        ("income", pa.array([True, None, True, True]), [1.0, np.nan, 1.0, 1.0]),
        ("income", pa.array([Decimal("1.25"), None, Decimal(2), Decimal(3)]), [1.25, np.nan, 2.0, 3.0]),
        ("age", pa.array([1, 2, 1, 2]).dictionary_encode(), [1.0, 2.0, 1.0, 2.0]),
        ("age", pa.array(["1", "2.5", "1e1", " 4 "]), [1.0, 2.5, 10.0, 4.0]),
        ("income", pa.nulls(4), [np.nan] * 4),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_numbers_of_any_type_become_float64(column, values, expected):
    frame, violations = conform(block(**{column: values}), DATA)
    assert violations == []
    assert frame[column].dtype == np.float64
    np.testing.assert_array_equal(frame[column], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["x", None, "", "?"]), ["x", None, None, None]),
        (pa.array(["x", None, "", "?"], pa.large_string()), ["x", None, None, None]),
        (pa.array(["x", None, "", "?"], pa.string_view()), ["x", None, None, None]),
        (pa.array(["x", None, "x", "?"]).dictionary_encode(), ["x", None, "x", None]),
        (pa.array(["1", "1.0", "true", "é"]), ["1", "1.0", "true", "é"]),
        (pa.nulls(4), [None] * 4),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_categories_of_any_type_become_strings(values, expected):
    frame, violations = conform(block(town=values), DATA)
    assert violations == []
    assert frame["town"].dtype == object
    assert frame["town"].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, 0, 1, 0]), ["1", "0", "1", "0"]),
        (pa.array([True, False, True, True]), ["true", "false", "true", "true"]),
        (pa.array(["a", "b", "a", "b"]).dictionary_encode(), ["a", "b", "a", "b"]),
    ],
)
def test_labels_are_compared_as_text(values, expected):
    frame, violations = conform(block(bought=values), DATA)
    assert violations == []
    assert frame["bought"].tolist() == expected


def test_columns_outside_the_contract_are_dropped():
    frame, _ = conform(block(other=[1, 2, 3, 4]), DATA)
    assert list(frame) == list(GOOD)


def test_a_block_without_rows_has_no_violations():
    frame, violations = conform(block().slice(0, 0), DATA)
    assert violations == []
    assert len(frame) == 0
    assert violation_table(block().slice(0, 0), DATA).num_rows == 0


def test_violation_tables_have_one_schema():
    good, bad = violation_table(block(), DATA), violation_table(block(age=[-1, 2, 3, 4]), DATA)
    assert good.schema == bad.schema
    assert (good.num_rows, bad.num_rows) == (0, 1)


def test_the_violations_of_all_blocks_are_added_up():
    blocks = [
        block(age=[-1.0, -2.0, 3.0, 4.0]),
        block(),
        block(age=[-1.0, -7.0, -8.0, 500.0], gender=["Male", None, "Male", "Male"]),
    ]
    rows = [row for b in blocks for row in violation_table(b, DATA).to_pylist()]
    with pytest.raises(UserError) as caught:
        require_no_violations(rows, 12_000)
    assert str(caught.value).splitlines() == [
        "the data breaks its contract (data.columns); correct the data or the contract:",
        "  age: must be at least 0: 5 of 12,000 rows, such as -1.0, -2.0, -7.0",
        "  age: must be at most 120: 1 of 12,000 rows, such as 500.0",
        "  gender: must not be missing: 1 of 12,000 rows",
    ]


def test_valid_data_raise_nothing():
    require_no_violations(violation_table(block(), DATA).to_pylist(), 4)


def test_conform_keeps_the_order_of_rows():
    ages = list(np.random.default_rng(0).permutation(100).astype(float))
    table = pa.table({name: values * 25 for name, values in GOOD.items()} | {"age": ages})
    frame, violations = conform(table, DATA)
    assert violations == []
    pd.testing.assert_series_equal(frame["age"], pd.Series(ages, name="age"))


def with_label(**label) -> Data:
    return Data.model_validate({**DATA.model_dump(), "label": {"column": "bought", **label}})


@pytest.mark.parametrize("values", [[20.0, 15.0, -3.0, 15.5], ["20", "15", "-3", "15.5"], [20, 15, -3, 16]])
def test_a_label_with_a_threshold_is_read_as_a_number(values):
    frame, violations = conform(block(bought=values), with_label(above=15))
    assert violations == []
    assert (frame["bought"] > 15).tolist() == [True, False, False, True]


def test_a_label_with_a_threshold_must_be_a_number():
    _, violations = conform(block(bought=["20", "late", "inf", ""]), with_label(above=15))
    rules = {(v.column, v.rule, v.count) for v in violations}
    assert ("bought", "must be a number", 1) in rules
    assert ("bought", "must not be missing", 1) in rules
    _, (infinite,) = conform(block(bought=[20.0, 1.0, float("inf"), 2.0]), with_label(above=15))
    assert (infinite.column, infinite.rule) == ("bought", "must be finite")


@pytest.mark.parametrize(
    ("label", "values"),
    [({"positive": "yes"}, ["yes", None, "?", ""]), ({"above": 15}, [20.0, None, float("nan"), None])],
)
def test_a_missing_label_may_be_dropped(label, values):
    frame, violations = conform(block(bought=values), with_label(**label, missing="drop"))
    assert violations == []
    assert frame["bought"].notna().tolist() == [True, False, False, False]


BY_TIME = Data.model_validate({**DATA.model_dump(), "split": {"by": "time", "column": "day"}})


def test_the_time_of_a_split_is_a_number():
    frame, violations = conform(
        block(day=["2013-01-01", "2013-01-02", "2013-01-03T10:00", "2013-02-01"]), BY_TIME
    )
    assert violations == []
    assert np.diff(frame[TIME].astype(float)).min() > 0
    assert "day" not in frame


def test_a_value_that_is_not_a_time_is_a_violation_of_its_column():
    _, violations = conform(block(day=["2013-01-01", "soon", None, ""]), BY_TIME)
    assert {(v.column, v.rule, v.count) for v in violations} == {
        ("day", "must be ISO 8601 or a number", 1),
        ("day", "must not be missing", 2),
    }


TEXTS = Data.model_validate(
    {
        "source": {"path": "rows.parquet"},
        "label": {"column": "mood", "classes": ["bad", "good"]},
        "columns": {"text": {"type": "text", "max_characters": 8}},
    }
)


def test_texts_and_classes_that_keep_the_contract():
    table = pa.table({"text": ["fine", "12345678"], "mood": ["good", "bad"]})
    frame, violations = conform(table, TEXTS)
    assert violations == []
    assert frame["text"].tolist() == ["fine", "12345678"]


def test_a_long_text_and_an_unknown_class_are_violations():
    table = pa.table({"text": ["123456789", None], "mood": ["great", "bad"]})
    _, violations = conform(table, TEXTS)
    assert {(v.column, v.rule, v.count) for v in violations} == {
        ("text", "must have at most 8 characters", 1),
        ("text", "must not be missing", 1),
        ("mood", "must be one of bad, good", 1),
    }
