"""The decision which feedback is stored, without a database."""

from collections import defaultdict
from dataclasses import replace

import pytest

from app.state.feedback import Feedback, FeedbackStatus, State, StoredFeedback, decide, merge, sender_of

FEEDBACK = Feedback("income", "id", {"reward": 1.0}, "bob", 100.0, "bob", predicted_at=99.0)
EARLY = replace(FEEDBACK, predicted_at=None)


def decided(feedback, stored=None, num_sent=0, per_hour=10):
    """The status, the state of what is stored, and the number of requests counted for the sender."""
    sent = {sender_of(feedback): num_sent}
    status, change = decide(feedback, stored, sent, per_hour)
    return status, change and change.state, sent[sender_of(feedback)]


def test_new_feedback_is_stored_and_counted():
    assert decided(FEEDBACK) == (FeedbackStatus.STORED, State.COUNTS, 1)
    assert decided(EARLY) == (FeedbackStatus.UNKNOWN_REQUEST, State.EARLY, 1)


def test_feedback_beyond_the_hourly_limit_is_quarantined():
    assert decided(FEEDBACK, num_sent=10) == (FeedbackStatus.QUARANTINED, State.EXCESS, 10)


def test_equal_feedback_is_a_duplicate_and_different_feedback_a_conflict():
    stored = StoredFeedback(FEEDBACK, State.COUNTS)
    assert decided(FEEDBACK, stored, num_sent=10) == (FeedbackStatus.DUPLICATE, None, 10)
    different = replace(FEEDBACK, content={"reward": 0.0})
    assert decided(different, stored) == (FeedbackStatus.CONFLICT, None, 0)


def test_more_outcomes_are_merged_with_the_stored_ones():
    stored = StoredFeedback(replace(FEEDBACK, content={"outcomes": [None, "no"]}), State.COUNTS)
    status, change = decide(
        replace(FEEDBACK, content={"outcomes": ["yes", None]}), stored, defaultdict(int), per_hour=0
    )
    assert status is FeedbackStatus.STORED
    assert change.feedback.content == {"outcomes": ["yes", "no"]}


def test_early_feedback_counts_only_if_its_prediction_was_made_before_it():
    stored = StoredFeedback(EARLY, State.EARLY)
    assert decided(FEEDBACK, stored) == (FeedbackStatus.DUPLICATE, None, 0)
    late_prediction = replace(FEEDBACK, content={"reward": 0.0}, predicted_at=101.0)
    assert decided(late_prediction, stored, num_sent=1) == (FeedbackStatus.STORED, State.COUNTS, 1), (
        "feedback from before the prediction is replaced"
    )


def test_excess_feedback_is_replaced():
    stored = StoredFeedback(FEEDBACK, State.EXCESS)
    assert decided(replace(FEEDBACK, content={"reward": 0.0}), stored) == (
        FeedbackStatus.STORED,
        State.COUNTS,
        1,
    )


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"reward": 1}, {"outcomes": ["a"]}, {"reward": 1, "outcomes": ["a"]}),
        ({"outcomes": ["a", None]}, {"outcomes": [None, "b"]}, {"outcomes": ["a", "b"]}),
        ({"outcomes": ["a"]}, {"outcomes": ["b"]}, None),
        ({"outcomes": ["a"]}, {"outcomes": ["a", "b"]}, None),
        ({"outcomes": [True]}, {"outcomes": [1]}, None),
        ({"reward": 1}, {"reward": 0}, None),
    ],
)
def test_feedback_is_merged_unless_it_contradicts(first, second, merged):
    assert merge(first, second) == merged
