import threading
import time

import pytest
import sqlalchemy

from app.state import database, record_tables
from app.state.audit import Audit
from app.state.feedback import Feedback, FeedbackStatus
from app.state.records import Records, decode, encode
from tests.records import AWKWARD, add, awkward, feedback, prediction


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    records = Records()
    yield records
    records.close()


def test_predictions_are_read_as_they_were_stored(records):
    assert add(records, prediction("b", at=7.0), prediction("a"), prediction("c", model="flights")) == 3
    first, second = records.predictions("income")
    assert (first.request_id, second.request_id) == ("a", "b")
    assert first.rows == [{"age": 39, "workclass": None}]
    assert first.answer == [{"probability": 0.1}], (
        "a float32 is stored with the fewest digits that identify it"
    )
    assert records.predictions("income", ["b"]) == [second]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_are_read_as_they_were_stored(records, text):
    stored = awkward(text)
    add(records, stored)
    assert records.predictions("income") == [stored]
    assert decode(encode(stored)) == stored


def test_the_first_prediction_for_a_request_id_is_kept(records):
    add(records, prediction("a"))
    second = prediction("a", variant="other", version="9", role="forced")
    shadow = prediction("a", variant="new", role="shadow")
    assert add(records, second, shadow) == 1
    assert [(p.variant, p.version) for p in records.predictions("income")] == [
        ("champion", "1"),
        ("new", "1"),
    ]


def test_one_request_id_of_two_principals_is_two_predictions(records):
    assert add(records, prediction("a"), prediction("a", principal="ann")) == 2
    assert [p.principal for p in records.predictions("income", ["a"], "ann")] == ["ann"]


def test_an_empty_batch_writes_nothing(records):
    assert records.add([]) == 0


def test_equal_feedback_is_a_duplicate_and_different_feedback_a_conflict(records):
    assert records.add_feedback([feedback("a")], 10) == [FeedbackStatus.STORED]
    batch = [feedback("a"), feedback("a", {"reward": 0.0}), feedback("b"), feedback("b")]
    assert records.add_feedback(batch, 10) == [
        FeedbackStatus.DUPLICATE, FeedbackStatus.CONFLICT, FeedbackStatus.STORED, FeedbackStatus.DUPLICATE,
    ]  # fmt: skip
    assert [(f.request_id, f.content) for f in records.feedback("income")] == [
        ("a", {"reward": 1.0}),
        ("b", {"reward": 1.0}),
    ]


def test_the_first_outcome_of_each_row_is_kept(records):
    steps = [
        ({"outcomes": ["yes", None]}, FeedbackStatus.STORED),
        ({"outcomes": [None, "no"]}, FeedbackStatus.STORED),
        ({"outcomes": ["yes", "no"]}, FeedbackStatus.DUPLICATE),
        ({"outcomes": ["no", "no"]}, FeedbackStatus.CONFLICT),
        ({"outcomes": ["yes"]}, FeedbackStatus.CONFLICT),
        ({"reward": 0.5}, FeedbackStatus.STORED),
        ({"reward": 0.6}, FeedbackStatus.CONFLICT),
    ]
    statuses = [records.add_feedback([feedback("a", content)], 10)[0] for content, _ in steps]
    assert statuses == [status for _, status in steps]
    assert [f.content for f in records.feedback("income")] == [{"outcomes": ["yes", "no"], "reward": 0.5}]


def test_feedback_beyond_the_hourly_limit_is_quarantined(records):
    old = feedback("old", at=time.time() - 4000)
    assert records.add_feedback([old], 2) == [FeedbackStatus.STORED]
    assert records.add_feedback([feedback(str(n)) for n in range(4)], 2) == [
        FeedbackStatus.STORED, FeedbackStatus.STORED, FeedbackStatus.QUARANTINED, FeedbackStatus.QUARANTINED,
    ]  # fmt: skip
    assert records.add_feedback([feedback("5"), feedback("6", principal="eve")], 2) == [
        FeedbackStatus.QUARANTINED,
        FeedbackStatus.STORED,
    ]
    assert {f.request_id for f in records.feedback("income")} == {"old", "0", "1", "6"}
    assert {f.request_id for f in records.feedback("income", quarantined=True)} == {"2", "3", "5"}
    assert records.add_feedback([feedback("2")], 2) == [FeedbackStatus.QUARANTINED], (
        "a repetition is quarantined too"
    )
    assert records.add_feedback([feedback("2", {"reward": 0.0})], 3) == [FeedbackStatus.STORED], (
        "quarantined feedback does not block later feedback"
    )


def test_the_hourly_limit_is_per_sender_and_model(records):
    flights = Feedback("flights", "a", {"reward": 1.0}, "bob", time.time(), "bob", 5.0)
    batch = [feedback("a"), flights, feedback("b"), feedback("c", sender="admin")]
    assert records.add_feedback(batch, 1) == [
        FeedbackStatus.STORED, FeedbackStatus.STORED, FeedbackStatus.QUARANTINED, FeedbackStatus.STORED,
    ]  # fmt: skip


def test_feedback_on_an_unknown_request_counts_once_its_prediction_is_recorded(records):
    early = feedback("a", at=10.0, predicted_at=None)
    assert records.add_feedback([early, early], 10) == [
        FeedbackStatus.UNKNOWN_REQUEST,
        FeedbackStatus.UNKNOWN_REQUEST,
    ]
    assert records.feedback("income") == []
    assert len(records.feedback("income", quarantined=True)) == 1
    add(records, prediction("a", at=9.0))
    assert [f.request_id for f in records.feedback("income")] == ["a"]
    assert records.rewards("income", 0.0) == {"1": (1, 1.0)}
    equal = feedback("a", predicted_at=9.0)
    different = feedback("a", {"reward": 0.0}, predicted_at=9.0)
    assert records.add_feedback([equal, different], 10) == [FeedbackStatus.DUPLICATE, FeedbackStatus.CONFLICT]


def test_feedback_from_before_the_prediction_never_counts(records):
    records.add_feedback([feedback("a", {"reward": 0.0}, at=8.0, predicted_at=None)], 10)
    add(records, prediction("a", at=9.0))
    assert records.feedback("income") == []
    assert records.rewards("income", 0.0) == {}
    assert records.add_feedback([feedback("a", predicted_at=9.0)], 10) == [FeedbackStatus.STORED]
    assert records.rewards("income", 0.0) == {"1": (1, 1.0)}


def test_feedback_counts_once_for_the_variant_that_answered(records):
    add(
        records,
        prediction("a", version="1"),
        prediction("a", version="2", variant="other"),
        prediction("a", version="3", variant="new", role="shadow"),
        prediction("a", version="4", principal="ann"),
    )
    records.add_feedback([feedback("a"), feedback("a", principal="eve")], 10)
    assert records.rewards("income", 0.0) == {"1": (1, 1.0)}


def test_one_of_concurrent_equal_feedbacks_is_stored(records):
    statuses = []

    def send():
        own = Records()
        statuses.extend(own.add_feedback([feedback(str(n)) for n in range(20)], 1000))
        own.close()

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status.value for status in statuses) == ["stored"] * 20 + ["stored before"] * 60
    assert len(records.feedback("income")) == 20


def test_nothing_is_opened_before_the_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", f"sqlite:///{tmp_path}/not/there.db")
    records = Records()
    with pytest.raises(sqlalchemy.exc.OperationalError):
        records.predictions("income")
    (tmp_path / "not").mkdir()
    assert records.predictions("income") == []
    records.close()


def test_only_the_owner_can_read_the_database(records, tmp_path):
    add(records, prediction("a"))
    files = [file for file in tmp_path.iterdir() if file.name.startswith("production")]
    assert len(files) >= 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_the_audit_log_can_be_opened_first(records):
    with Audit() as audit:
        audit.add("traffic", "income", {})
    assert add(records, prediction("a")) == 1


def test_concurrent_connections_with_and_without_parts_find_all_tables(tmp_path):
    databases = [database.connect(*parts) for parts in ((), (record_tables.PART,)) for _ in range(4)]
    errors = []

    def read(db):
        try:
            with db.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT count(*) FROM schema_versions"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(db,)) for db in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for db in databases:
        db.dispose()
    assert errors == []
