"""Predictions and feedback for tests, and the tables of version 1."""

import time

import numpy as np

from app.state.feedback import Feedback
from app.state.records import Prediction, encode


def prediction(request_id, **changes):
    values = {
        "model": "income", "request_id": request_id, "variant": "champion", "version": "1", "role": "served",
        "unit": "u", "principal": "bob", "at": 5.0, "seconds": 0.001,
        "rows": [{"age": 39, "workclass": None}], "answer": [{"probability": np.float32(0.1)}],
    }  # fmt: skip
    return Prediction(**(values | changes))


AWKWARD = ["ü😀", "'\"\\", "%(batch)s :batch ?", "a\0b", "\u2028", "null", "[1]", "7", ""]


def awkward(text):
    """A prediction with the text as unit, feature name and value."""
    row = {text: text, "large": 2**53 + 1, "small": 1e-300, "exact": 0.1 + 0.2, "none": None, "yes": True}
    request_id = f"id{AWKWARD.index(text)}"
    return prediction(
        request_id, at=1_790_000_000.123456, seconds=1 / 3, rows=[row], unit=text.replace("\0", ""), answer=[]
    )


def feedback(request_id, content=None, principal="bob", at=None, **changes):
    values = {"sender": principal, "predicted_at": 5.0} | changes
    return Feedback("income", request_id, content or {"reward": 1.0}, principal, at or time.time(), **values)


def add(records, *predictions):
    return records.add([encode(prediction) for prediction in predictions])


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
"""The tables of the first release, which stored no version number."""


def check_migrated(records):
    """Check that the migrated tables of VERSION_1 have their rows, and accept new ones."""
    stored = [(p.request_id, p.principal, p.shadow, p.version) for p in records.predictions("income")]
    assert sorted(stored) == [("a", "bob", "", "1"), ("a", "bob", "new", "3"), ("b", "ann", "", "1")]
    assert records.predictions("income")[0].rows == [{"age": 1}]
    assert [(f.request_id, f.principal, f.sender) for f in records.feedback("income")] == [
        ("a", "bob", "labels"),
        ("c", "eve", "eve"),
    ]
    assert [f.request_id for f in records.feedback("income", quarantined=True)] == ["b"]
    assert records.rewards("income", 0.0) == {"1": (1, 1.0)}
    assert add(records, prediction("a"), prediction("a", principal="ann")) == 1
