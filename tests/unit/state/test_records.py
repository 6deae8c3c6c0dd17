import sqlite3
import threading
import time

import numpy as np
import pytest
import sqlalchemy

from app.errors import UserError
from app.state import database, record_tables
from app.state.audit import Audit
from app.state.feedback import Feedback, FeedbackStatus
from app.state.records import Prediction, Records, decode, encode


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


def feedback(request_id, content=None, principal="bob", at=None, **changes):
    values = {"sender": principal, "predicted_at": 5.0} | changes
    return Feedback("income", request_id, content or {"reward": 1.0}, principal, at or time.time(), **values)


def add(records, *predictions):
    return records.add([encode(one) for one in predictions])


def test_predictions_are_read_as_they_were_stored(records):
    assert add(records, prediction("b", at=7.0), prediction("a"), prediction("c", model="flights")) == 3
    first, second = records.predictions("income")
    assert (first.request_id, second.request_id) == ("a", "b")
    assert first.rows == [{"age": 39, "workclass": None}]
    assert first.answer == [{"probability": 0.1}], "float32 is written with its own shortest digits"
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


def test_equal_feedback_is_a_duplicate_and_different_feedback_a_contradiction(records):
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
    assert records.add_feedback([feedback("2")], 2) == [FeedbackStatus.QUARANTINED], "a second time too"
    assert records.add_feedback([feedback("2", {"reward": 0.0})], 3) == [FeedbackStatus.STORED], (
        "it does not keep later feedback out"
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
    assert sorted(v.value for v in statuses) == ["stored"] * 20 + ["stored before"] * 60
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


VERSION_1 = """
CREATE TABLE predictions (
    model VARCHAR(128) NOT NULL, request_id VARCHAR(64) NOT NULL, variant VARCHAR(128) NOT NULL,
    version VARCHAR(32) NOT NULL, role VARCHAR(8) NOT NULL, unit VARCHAR(256) NOT NULL,
    principal VARCHAR(256) NOT NULL, at FLOAT NOT NULL, seconds FLOAT NOT NULL, rows {bytes} NOT NULL,
    answer {bytes} NOT NULL, PRIMARY KEY (model, request_id, variant)
);
CREATE INDEX predictions_at ON predictions (model, at);
CREATE TABLE feedback (
    model VARCHAR(128) NOT NULL, request_id VARCHAR(64) NOT NULL, said TEXT NOT NULL, reward FLOAT,
    principal VARCHAR(256) NOT NULL, at FLOAT NOT NULL, quarantined BOOLEAN NOT NULL,
    PRIMARY KEY (model, request_id)
);
CREATE INDEX feedback_at ON feedback (model, at);
CREATE INDEX feedback_principal ON feedback (principal, at);
INSERT INTO predictions VALUES
    ('income', 'a', 'champion', '1', 'served', 'u', 'bob', 5, 0.1, {rows}, {rows}),
    ('income', 'a', 'challenger', '2', 'served', 'u', 'bob', 6, 0.1, {rows}, {rows}),
    ('income', 'a', 'new', '3', 'shadow', 'u', 'bob', 5, 0.1, {rows}, {rows}),
    ('income', 'b', 'champion', '1', 'served', 'u', 'ann', 7, 0.1, {rows}, {rows});
INSERT INTO feedback VALUES
    ('income', 'a', '{{"reward": 1.0}}', 1.0, 'labels', 8, false),
    ('income', 'b', '{{"reward": 0.5}}', 0.5, 'ann', 9, true),
    ('income', 'c', '{{"reward": 0.0}}', 0.0, 'eve', 9, false);
"""
"""The tables as Raylway created them before they had versions."""


def check_migrated(records):
    """The migrated VERSION_1 has its rows, and accepts new ones."""
    kept = [(p.request_id, p.principal, p.shadow, p.version) for p in records.predictions("income")]
    assert sorted(kept) == [("a", "bob", "", "1"), ("a", "bob", "new", "3"), ("b", "ann", "", "1")]
    assert records.predictions("income")[0].rows == [{"age": 1}]
    assert [(f.request_id, f.principal, f.sender) for f in records.feedback("income")] == [
        ("a", "bob", "labels"),
        ("c", "eve", "eve"),
    ]
    assert [f.request_id for f in records.feedback("income", quarantined=True)] == ["b"]
    assert records.rewards("income", 0.0) == {"1": (1, 1.0)}
    assert add(records, prediction("a"), prediction("a", principal="ann")) == 1


def test_the_tables_of_version_1_are_migrated(records, tmp_path):
    with sqlite3.connect(tmp_path / "production.db") as connection:
        connection.executescript(VERSION_1.format(bytes="BLOB", rows="CAST('[{\"age\": 1}]' AS BLOB)"))
    connection.close()
    others = [Records() for _ in range(4)]
    threads = [threading.Thread(target=other.predictions, args=("income",)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_migrated(records)
    for other in others:
        other.close()


def test_a_migration_that_fails_leaves_the_old_tables(records, tmp_path, monkeypatch):
    with sqlite3.connect(tmp_path / "production.db") as connection:
        connection.executescript(VERSION_1.format(bytes="BLOB", rows="CAST('[{\"age\": 1}]' AS BLOB)"))
    connection.close()
    create_all = sqlalchemy.MetaData.create_all

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(sqlalchemy.MetaData, "create_all", fail)
    with pytest.raises(RuntimeError, match="killed"):
        records.predictions("income")
    monkeypatch.setattr(sqlalchemy.MetaData, "create_all", create_all)
    check_migrated(records)


def test_tables_of_a_newer_version_are_refused(records, tmp_path):
    add(records, prediction("a"))
    with sqlite3.connect(tmp_path / "production.db") as connection:
        connection.execute("UPDATE schema_versions SET version = 9")
    connection.close()
    later = Records()
    with pytest.raises(UserError, match="version 9, written by a newer Raylway"):
        later.predictions("income")
    later.close()


def test_the_audit_log_can_be_opened_first(records):
    with Audit() as audit:
        audit.add("traffic", "income", {})
    assert add(records, prediction("a")) == 1


def test_connections_with_and_without_parts_find_all_tables(tmp_path):
    databases = [database.connect(*parts) for parts in ((), (record_tables.PART,)) for _ in range(4)]
    faults = []

    def read(one):
        try:
            with one.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT count(*) FROM schema_versions"))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=read, args=(one,)) for one in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in databases:
        one.dispose()
    assert faults == []
