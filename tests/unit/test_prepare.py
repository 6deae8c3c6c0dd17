"""What prepare does with a block; the whole stage is tested on a cluster."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from app.config import Label, Project
from app.data import split
from app.data.prepare import LABEL, _count_times, _label_and_part, _refuse_labels
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


def test_by_time_and_threshold_the_late_rows_are_the_test_part():
    counted = _count_times(BLOCK, FLIGHTS.data)
    starts = split.starts(counted["time"].to_numpy(), counted["rows"].to_numpy(), FLIGHTS.data.split)
    table = _label_and_part(BLOCK, FLIGHTS, starts)
    rows = {row["distance"]: row for row in table.to_pylist()}
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11], "without the rows that have no label"
    assert [rows[i][LABEL] for i in (0, 1, 2, 3)] == [1, 0, 1, 0], "15 is not above 15"
    assert [i for i in sorted(rows) if rows[i]["__part__"] == split.PARTS.index("test")] == [0, 1]
    assert [i for i in sorted(rows) if rows[i]["__part__"] == split.PARTS.index("validation")] == [2, 3]
    assert set(table.column_names) == {"distance", "delay", LABEL, "__part__"}, "nor the time"


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"not above 15": 7}, "'delay' must have two values or more, but it is constant: 'not above 15'"),
        ({"yes": 1, "no": 2}, "'above 15' does not occur in 'delay'; it has 'no' (2 rows), 'yes' (1 rows)"),
    ],
)
def test_a_label_that_cannot_be_learnt_is_refused(counts, says):
    with pytest.raises(UserError) as caught:
        _refuse_labels(Counter(counts), Label(column="delay", above=15))
    assert says in str(caught.value)
