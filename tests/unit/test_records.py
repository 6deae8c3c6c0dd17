import threading
import time

import numpy as np
import pytest

from app.records import Feedback, Prediction, Records, Verdict


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    records = Records()
    yield records
    records.close()


def prediction(request_id, **changes):
    values = {
        "model": "income", "request_id": request_id, "variant": "champion", "version": "1", "role": "served",
        "unit": "u", "principal": "bob", "at": 5.0, "seconds": 0.001,
        "rows": [{"age": 39, "workclass": None}], "answer": [{"probability": np.float32(0.1)}],
    }  # fmt: skip
    return Prediction(**(values | changes))


AWKWARD = ["ü😀", "'\"\\", "%(batch)s :batch ?", "a\0b", "\u2028", "null", "[1]", "7", ""]


def awkward(text):
    row = {text: text, "large": 2**53 + 1, "small": 1e-300, "exact": 0.1 + 0.2, "none": None, "yes": True}
    request_id = f"id{AWKWARD.index(text)}"
    return prediction(
        request_id, at=1_790_000_000.123456, seconds=1 / 3, rows=[row], unit=text.replace("\0", ""), answer=[]
    )


def feedback(request_id, said=None, principal="bob", at=None):
    return Feedback("income", request_id, said or {"reward": 1.0}, principal, at or time.time())


def test_predictions_come_back_as_they_were(records):
    records.add([prediction("b", at=7.0), prediction("a"), prediction("c", model="flights")])
    first, second = records.predictions("income")
    assert (first.request_id, second.request_id) == ("a", "b")
    assert first.rows == [{"age": 39, "workclass": None}]
    assert first.answer == [{"probability": 0.1}], "float32 is written with its own shortest digits"
    assert records.predictions("income", ["b"]) == [second]


@pytest.mark.parametrize("text", AWKWARD)
def test_whatever_was_asked_comes_back(records, text):
    asked = awkward(text)
    records.add([asked])
    assert records.predictions("income") == [asked]


def test_a_prediction_that_is_there_stays(records):
    records.add([prediction("a")])
    records.add([prediction("a", version="9"), prediction("a", variant="shadow", role="shadow")])
    assert [(p.variant, p.version) for p in records.predictions("income")] == [
        ("champion", "1"),
        ("shadow", "1"),
    ]


def test_the_same_again_is_no_news_and_another_is_a_contradiction(records):
    assert records.judge([feedback("a")], 10) == [Verdict.STORED]
    given = [
        feedback("a"),
        feedback("a", {"reward": 0.0}),
        feedback("b"),
        feedback("b"),
        feedback("b", {"x": 1}),
    ]
    assert records.judge(given, 10) == [
        Verdict.AGAIN, Verdict.CONTRADICTED, Verdict.STORED, Verdict.AGAIN, Verdict.CONTRADICTED,
    ]  # fmt: skip
    assert [(f.request_id, f.said) for f in records.feedback("income")] == [
        ("a", {"reward": 1.0}),
        ("b", {"reward": 1.0}),
    ]


def test_more_than_its_share_in_an_hour_is_stored_apart(records):
    old = feedback("old", at=time.time() - 4000)
    assert records.judge([old], 2) == [Verdict.STORED]
    assert records.judge([feedback(str(n)) for n in range(4)], 2) == [
        Verdict.STORED, Verdict.STORED, Verdict.QUARANTINED, Verdict.QUARANTINED,
    ]  # fmt: skip
    assert records.judge([feedback("5"), feedback("6", principal="eve")], 2) == [
        Verdict.QUARANTINED,
        Verdict.STORED,
    ]
    assert {f.request_id for f in records.feedback("income")} == {"old", "0", "1", "6"}
    assert {f.request_id for f in records.feedback("income", quarantined=True)} == {"2", "3", "5"}


def test_of_those_who_say_it_at_the_same_time_one_is_stored(records):
    verdicts = []

    def say():
        mine = Records()
        verdicts.extend(mine.judge([feedback(str(n)) for n in range(20)], 1000))
        mine.close()

    threads = [threading.Thread(target=say) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(v.value for v in verdicts) == ["stored"] * 20 + ["stored before"] * 60
    assert len(records.feedback("income")) == 20
