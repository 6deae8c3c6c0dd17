"""Feedback on predictions: which of it is stored, and which counts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Any, NamedTuple

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Feedback:
    """The outcomes or the reward of a prediction, as a client sent them."""

    model: str
    request_id: str
    content: Mapping[str, Any]
    """`outcomes`, one per row and null for an unknown one, `reward`, or both."""
    principal: str
    """Principal that got the prediction."""
    at: float
    """Time of the feedback, seconds since the epoch."""
    sender: str
    predicted_at: float | None = None
    """Time of the prediction, seconds since the epoch; None if no prediction is recorded."""


class State(StrEnum):
    """Whether stored feedback counts."""

    COUNTS = "counts"
    EARLY = "early"
    """No prediction was recorded when it came. It counts once a prediction is recorded that was made before
    the feedback: predictions are recorded after they are answered. Later feedback can replace it."""
    EXCESS = "excess"
    """Beyond its sender's hourly limit; it never counts. Later feedback can replace it."""


class FeedbackStatus(Enum):
    """Result of storing feedback; the value is the status in the answer."""

    STORED = "stored"
    DUPLICATE = "stored before"
    """Equal feedback was stored before."""
    CONFLICT = "contradicted"
    """Different feedback was stored before, and is kept."""
    QUARANTINED = "quarantined"
    """Stored, but beyond the hourly limit."""
    UNKNOWN_REQUEST = "unknown request"
    """Stored, but it does not count until the prediction is recorded."""


class StoredFeedback(NamedTuple):
    """Feedback with its state."""

    feedback: Feedback
    state: State


class Sender(NamedTuple):
    """A sender of feedback on a model; the hourly limit is per sender and model."""

    model: str
    name: str


def sender_of(feedback: Feedback) -> Sender:
    return Sender(feedback.model, feedback.sender)


def decide(
    feedback: Feedback, stored: StoredFeedback | None, num_sent: dict[Sender, int], per_hour: int
) -> tuple[FeedbackStatus, StoredFeedback | None]:
    """The status of feedback, and what to store, if anything.

    `stored` is the stored feedback on the same prediction, `num_sent` the number of requests on which each
    sender has sent feedback within the last hour; it is updated. `per_hour` is its limit.
    """
    predicted_at, sender = feedback.predicted_at, sender_of(feedback)
    if stored is not None:
        previous, state = stored
        was_in_time = predicted_at is not None and previous.at >= predicted_at
        if state is State.COUNTS or (state is State.EARLY and was_in_time):
            content = merge(previous.content, feedback.content)
            if content is None:
                return FeedbackStatus.CONFLICT, None
            if content == previous.content:
                return FeedbackStatus.DUPLICATE, None
            return FeedbackStatus.STORED, StoredFeedback(replace(previous, content=content), State.COUNTS)
        is_in_num_sent = previous.sender == feedback.sender and previous.at > feedback.at - HOUR_S
        if state is State.EARLY and is_in_num_sent:
            num_sent[sender] -= 1  # the feedback replaces the previous one
    if num_sent[sender] >= per_hour:
        return FeedbackStatus.QUARANTINED, StoredFeedback(feedback, State.EXCESS)
    num_sent[sender] += 1
    if predicted_at is None:
        return FeedbackStatus.UNKNOWN_REQUEST, StoredFeedback(feedback, State.EARLY)
    return FeedbackStatus.STORED, StoredFeedback(feedback, State.COUNTS)


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of two feedbacks together; None if they contradict each other.

    A null outcome contradicts no other: the other one is kept.
    """
    merged = {**second, **first}
    if "reward" in first and "reward" in second and first["reward"] != second["reward"]:
        return None
    if "outcomes" in first and "outcomes" in second:
        if len(first["outcomes"]) != len(second["outcomes"]):
            return None
        pairs = list(zip(first["outcomes"], second["outcomes"], strict=True))
        # Compared as JSON, in which true is not 1.
        if any(None not in (old, new) and json.dumps(old) != json.dumps(new) for old, new in pairs):
            return None
        merged["outcomes"] = [old if old is not None else new for old, new in pairs]
    return merged
