"""The functions of prepare for one block. Integration tests run the whole stage on a cluster."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from app.config import Label, Project
from app.data import split
from app.data.prepare import (
    LABEL,
    PART,
    Prepared,
    _count_times,
    _dropped_columns,
    _label_and_part,
    _label_counts,
    _require_learnable,
    _select,
)
from app.errors import UserError
from tests.bundles import PROJECT

FLIGHTS = Project.model_validate(
    {
        **PROJECT,
        "data": {
            "source": {"path": "unused.parquet"},
            "label": {"column": "delay", "above": 15, "missing": "drop"},
            "columns": {"distance": {"type": "number"}},
            "split": {"by": "time", "column": "day", "validation": 0.2, "test": 0.2},
        },
        "features": {"distance": {"encode": "min_max"}},
    }
)
BLOCK = pa.table(
    {
        "distance": np.arange(12.0),
        "delay": [99.0, 15.0, 15.5, 0.0, -9.0, 16.0, 1.0, None, 20.0, 3.0, float("nan"), 30.0],
        "day": [f"2013-01-{31 - i}" for i in range(12)],
    }
)


def test_with_a_split_by_time_and_a_threshold_the_latest_rows_are_the_test_part():
    counted = _count_times(BLOCK, FLIGHTS.data)
    starts = split.part_starts(counted["time"].to_numpy(), counted["rows"].to_numpy(), FLIGHTS.data.split)
    table = _label_and_part(BLOCK, FLIGHTS, starts)
    rows = {row["distance"]: row for row in table.to_pylist()}
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11], "rows without a label are dropped"
    assert [rows[i][LABEL] for i in (0, 1, 2, 3)] == [1, 0, 1, 0], "15 is not above 15"
    assert [i for i in sorted(rows) if rows[i][PART] == split.PARTS.index("test")] == [0, 1]
    assert [i for i in sorted(rows) if rows[i][PART] == split.PARTS.index("validation")] == [2, 3]
    assert set(table.column_names) == {"distance", "delay", LABEL, PART, split.TIME}
    columns = {
        part: _select(table, 0, _dropped_columns(part, FLIGHTS.data)).column_names for part in split.PARTS
    }
    assert columns == {
        "train": ["distance", LABEL],
        "validation": ["distance", LABEL],
        "test": ["distance", LABEL, split.TIME],
    }


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"not above 15": 7}, "'delay' must have two values or more, but it is constant: 'not above 15'"),
        ({"yes": 1, "no": 2}, "'above 15' must occur in 'delay', which has 'no' (2 rows), 'yes' (1 rows)"),
    ],
)
def test_a_label_that_cannot_be_learned_is_refused(counts, message):
    with pytest.raises(UserError) as caught:
        _require_learnable(Counter(counts), Label(column="delay", above=15))
    assert message in str(caught.value)


@pytest.mark.parametrize("counts", [[99_996, 4], [99_986, 14], [1, 10**9], [3, 5, 2]])
def test_balanced_weights_are_exact_however_rare_a_label_is(counts, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"parts": {"train": {"counts": counts}}}))
    weights = Prepared(tmp_path, cached=True).balanced_weights()
    total = sum(counts)
    np.testing.assert_allclose(weights, [total / (len(counts) * count) for count in counts], rtol=1e-6)
    np.testing.assert_allclose(weights * counts, total / len(counts), rtol=1e-6, err_msg="all weigh the same")


def test_labels_are_counted_over_all_blocks():
    blocks = [{"value": 1.0, "rows": 3}, {"value": 0.0, "rows": 2}, {"value": 1.0, "rows": 1}]
    assert _label_counts(blocks, Label(column="delay", above=15)) == [2, 4]
    assert _label_counts(blocks[:1], Label(column="delay", classes=["a", "b", "c"])) == [0, 3, 0]
