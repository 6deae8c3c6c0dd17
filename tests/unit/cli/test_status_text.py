"""The status of endpoints as text for people."""

import io
from typing import Any

from rich.console import Console

from app.cli import status_text

VARIANT = {
    "version": "2",
    "share": 0.9,
    "shadow": False,
    "requests_per_s": 12.34,
    "p50_s": 0.0021,
    "p99_s": 0.0456,
    "error_rate": 0.005,
    "workers": None,
}
ENDPOINT: dict[str, Any] = {
    "name": "income",
    "status": "RUNNING",
    "replicas": {"running": 2, "target": 3},
    "variants": {"champion": VARIANT},
    "faults": [],
    "recording": {"dropped": {}, "faults": [], "waiting": 0, "waiting_bytes": 0},
    "not_recorded": 0,
    "not_shadowed": 0,
    "watch": {"looked_s_ago": 1.2, "failures": 0, "last_error": None},
}


def shown(*documents: dict[str, Any]) -> list[str]:
    screen = Console(file=io.StringIO(), width=120)
    for renderable in status_text.renderables(documents):
        screen.print(renderable, soft_wrap=True)
    return [" ".join(line.split()) for line in screen.file.getvalue().splitlines()]


def test_without_endpoints_nothing_is_served():
    assert shown() == ["nothing is served"]


def test_an_endpoint_is_a_table_of_its_variants():
    title, header, row, watch = shown(ENDPOINT)
    assert title == "income: RUNNING, 2 of 3 replicas"
    assert header == "variant version share requests/s p50 ms p99 ms errors"
    assert row == "champion 2 90% 12.3 2.1 45.6 0.50%"
    assert watch == "watch: last round 1 s ago, 0 failures"


def test_a_row_marks_shadows_and_workers_and_leaves_missing_numbers_empty():
    idle = {**VARIANT, "shadow": True, "p50_s": None, "p99_s": None, "error_rate": None, "workers": [1, 2]}
    row = shown({**ENDPOINT, "variants": {"heavy": idle}})[2]
    assert row == "heavy (1 workers) 2 shadow 12.3"


def test_faults_are_below_the_table():
    recording = {
        "dropped": {"too large": 1200},
        "faults": ["connection refused"],
        "waiting": 3000,
        "waiting_bytes": 4_500_000,
    }
    lines = shown(
        {
            **ENDPOINT,
            "faults": ["version 3 is broken"],
            "recording": recording,
            "not_recorded": 1200,
            "not_shadowed": 7,
            "watch": {"looked_s_ago": 9, "failures": 2, "last_error": "OSError: away"},
        }
    )
    assert lines[3:] == [
        "fault: version 3 is broken",
        "1,200 predictions were not recorded (too large: 1,200)",
        "the database takes no records, 3,000 predictions (4.5 MB) wait: connection refused",
        "7 requests were not shadowed",
        "watch: last round 9 s ago, 2 failures, the last: OSError: away",
    ]


def test_a_watch_that_does_not_answer_is_reported():
    assert shown({**ENDPOINT, "watch": None})[-1].startswith("watch: does not answer; ")
