"""The log of predictions and of what came of them, in SQL (SQLite, PostgreSQL)."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Any

import orjson
import sqlalchemy
from sqlalchemy import Row

from app.state import database, record_tables
from app.state.record_tables import COLUMNS, FEEDBACK, PREDICTIONS

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A request and a variant's answer to it."""

    model: str
    request_id: str
    variant: str
    version: str
    role: str
    """`served`; `forced`, if the client chose the variant; or `shadow`, if nobody got the answer."""
    unit: str
    principal: str
    at: float
    """When the request came, seconds since the epoch."""
    seconds: float
    """Duration of the answer."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of the request."""
    answer: Sequence[Mapping[str, Any]]
    """Answer to each row; numbers may be numpy's."""

    @property
    def shadow(self) -> str:
        """Name of the shadow that answered; empty for the answer that the client got."""
        return self.variant if self.role == "shadow" else ""


@dataclass(frozen=True, slots=True)
class Feedback:
    """The outcomes or the reward of a prediction, as a client reports them."""

    model: str
    request_id: str
    content: Mapping[str, Any]
    """`outcomes`, one for each row and null where it is unknown, `reward`, or both."""
    principal: str
    """Principal who got the prediction."""
    at: float
    """Time of the feedback, in seconds since the epoch."""
    sender: str
    """Principal who sent the feedback."""
    predicted_at: float | None = None
    """Time of the prediction, in seconds since the epoch; None if no prediction is recorded."""


class State(StrEnum):
    """Whether stored feedback counts. Feedback that does not count is replaced by later feedback."""

    COUNTS = "counts"
    EARLY = "early"
    """No prediction was recorded when it came. It counts as soon as a prediction is recorded that was made
    before it: predictions are recorded after their answers are sent."""
    EXCESS = "excess"
    """The sender exceeded the limit per hour; it never counts."""


class FeedbackStatus(Enum):
    """Result of storing feedback."""

    STORED = "stored"
    DUPLICATE = "stored before"
    """The same feedback is stored already."""
    CONFLICT = "contradicted"
    """It contradicts feedback that is stored, which stays."""
    QUARANTINED = "quarantined"
    """Its sender exceeded the limit per hour: it is stored, but does not count."""
    UNKNOWN_REQUEST = "unknown request"
    """No prediction is recorded: it is stored, and counts as soon as one is that was made before it."""


def encode(prediction: Prediction) -> bytes:
    """A prediction as the database takes it. Raises TypeError or ValueError for values that JSON has not."""
    values = [getattr(prediction, name) for name in COLUMNS]
    # As text within the JSON: PostgreSQL does not look into it, where it would not take "\u0000".
    values[-2:] = [orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode() for value in values[-2:]]
    return orjson.dumps(values)


def decode(encoded: bytes) -> Prediction:
    """The prediction that was encoded."""
    return _restored(dict(zip(COLUMNS, orjson.loads(encoded), strict=True)))


class Records:
    """The two tables. Safe to use from several threads and processes; opened at the first use."""

    def __init__(self) -> None:
        self._database = database.connect(record_tables.PART)

    def add(self, encoded: Sequence[bytes]) -> int:
        """Store all of these predictions or none; returns how many are new, when they are durable.

        The first prediction for a principal's request id stays. An empty batch shows that the database takes
        writes. Raises SQLAlchemyError, or what the driver raises, if it does not.
        """
        batch = b"[" + b",".join(encoded) + b"]"
        with self._database.begin() as connection:
            statement = record_tables.insert(connection.dialect.name)
            return connection.execute(statement, {"batch": batch.decode()}).rowcount

    def add_feedback(self, batch: Sequence[Feedback], per_hour: int) -> list[FeedbackStatus]:
        """Store what is new; returns the status of each feedback when all are durable.

        A sender may send feedback on `per_hour` requests to a model within an hour; the excess is
        quarantined. The first outcome of a row, and the first reward, that count cannot be changed.
        """
        with self._database.begin() as connection:
            # Nobody else writes between the reads and the writes below.
            database.begin_exclusively(connection, "feedback")
            stored = _stored(connection, batch)
            senders = {(f.model, f.sender) for f in batch}
            num_sent = {sender: _num_sent(connection, *sender) for sender in senders}
            statuses, changed = [], {}
            for feedback in batch:
                status, change = _decide(feedback, stored.get(_key(feedback)), num_sent, per_hour)
                statuses.append(status)
                if change is not None:
                    stored[_key(feedback)] = changed[_key(feedback)] = change
            if changed:
                connection.execute(FEEDBACK.delete().where(_KEY.in_(list(changed))))
                connection.execute(FEEDBACK.insert(), [_values(*change) for change in changed.values()])
        return statuses

    def predictions(
        self, model: str, request_ids: Iterable[str] | None = None, principal: str | None = None
    ) -> list[Prediction]:
        """A model's predictions, or some of them, the oldest first."""
        query = PREDICTIONS.select().where(PREDICTIONS.c.model == model).order_by(PREDICTIONS.c.at)
        if request_ids is not None:
            query = query.where(PREDICTIONS.c.request_id.in_(list(request_ids)))
        if principal is not None:
            query = query.where(PREDICTIONS.c.principal == principal)
        with self._database.connect() as connection:
            return [_restored(dict(row._mapping)) for row in connection.execute(query)]

    def feedback(self, model: str, *, quarantined: bool = False) -> list[Feedback]:
        """The feedback on a model that counts, or that is set apart, the oldest first.

        Outcomes that came before their prediction was recorded may be more or fewer than its rows.
        """
        made_before = PREDICTIONS.select().where(_IS_ABOUT, PREDICTIONS.c.at <= FEEDBACK.c.at).exists()
        counts = (FEEDBACK.c.state == State.COUNTS) | ((FEEDBACK.c.state == State.EARLY) & made_before)
        query = FEEDBACK.select().where(FEEDBACK.c.model == model, ~counts if quarantined else counts)
        with self._database.connect() as connection:
            return [_feedback(row) for row in connection.execute(query.order_by(FEEDBACK.c.at))]

    def rewards(self, model: str, since: float) -> dict[str, tuple[int, float]]:
        """Number and sum of each version's rewards since a time, seconds since the epoch.

        Only answers that clients got by chance count, each once, and only feedback that counts.
        """
        counts = (FEEDBACK.c.state == State.COUNTS) | (
            (FEEDBACK.c.state == State.EARLY) & (PREDICTIONS.c.at <= FEEDBACK.c.at)
        )
        query = (
            sqlalchemy.select(
                PREDICTIONS.c.version, sqlalchemy.func.count(), sqlalchemy.func.sum(FEEDBACK.c.reward)
            )
            .select_from(FEEDBACK.join(PREDICTIONS, _IS_ABOUT))
            .where(
                FEEDBACK.c.model == model,
                FEEDBACK.c.at >= since,
                FEEDBACK.c.reward.is_not(None),
                counts,
                PREDICTIONS.c.role == "served",
                PREDICTIONS.c.at >= since,
            )
            .group_by(PREDICTIONS.c.version)
        )
        with self._database.connect() as connection:
            return {version: (count, total) for version, count, total in connection.execute(query)}

    def close(self) -> None:
        self._database.dispose()


_Key = tuple[str, str, str]
_KEY = sqlalchemy.tuple_(FEEDBACK.c.model, FEEDBACK.c.principal, FEEDBACK.c.request_id)
_IS_ABOUT = sqlalchemy.and_(
    PREDICTIONS.c.model == FEEDBACK.c.model,
    PREDICTIONS.c.principal == FEEDBACK.c.principal,
    PREDICTIONS.c.request_id == FEEDBACK.c.request_id,
    PREDICTIONS.c.shadow == "",
)


def _key(feedback: Feedback) -> _Key:
    return feedback.model, feedback.principal, feedback.request_id


def _stored(
    connection: sqlalchemy.Connection, batch: Sequence[Feedback]
) -> dict[_Key, tuple[Feedback, State]]:
    """The stored feedback on the same predictions as the batch."""
    query = FEEDBACK.select().where(_KEY.in_([_key(feedback) for feedback in batch]))
    stored = [(_feedback(row), State(row.state)) for row in connection.execute(query)]
    return {_key(feedback): (feedback, state) for feedback, state in stored}


def _num_sent(connection: sqlalchemy.Connection, model: str, sender: str) -> int:
    """Number of requests to a model on which a sender has sent feedback within the last hour."""
    query = sqlalchemy.select(sqlalchemy.func.count()).where(
        FEEDBACK.c.model == model,
        FEEDBACK.c.said_by == sender,
        FEEDBACK.c.at > time.time() - HOUR_S,
        FEEDBACK.c.state != State.EXCESS,
    )
    return connection.execute(query).scalar_one()


def _decide(
    feedback: Feedback,
    stored: tuple[Feedback, State] | None,
    num_sent: dict[tuple[str, str], int],
    per_hour: int,
) -> tuple[FeedbackStatus, tuple[Feedback, State] | None]:
    """The status of feedback, and what is to be stored, if anything. Updates `num_sent`."""
    predicted_at, sender = feedback.predicted_at, (feedback.model, feedback.sender)
    if stored is not None:
        previous, state = stored
        was_in_time = predicted_at is not None and previous.at >= predicted_at
        if state is State.COUNTS or (state is State.EARLY and was_in_time):
            content = _merge(previous.content, feedback.content)
            if content is None:
                return FeedbackStatus.CONFLICT, None
            if content == previous.content:
                return FeedbackStatus.DUPLICATE, None
            return FeedbackStatus.STORED, (replace(previous, content=content), State.COUNTS)
        is_in_num_sent = previous.sender == feedback.sender and previous.at > feedback.at - HOUR_S
        if state is State.EARLY and is_in_num_sent:
            num_sent[sender] -= 1  # it is replaced
    if num_sent[sender] >= per_hour:
        return FeedbackStatus.QUARANTINED, (feedback, State.EXCESS)
    num_sent[sender] += 1
    if predicted_at is None:
        return FeedbackStatus.UNKNOWN_REQUEST, (feedback, State.EARLY)
    return FeedbackStatus.STORED, (feedback, State.COUNTS)


def _merge(stored: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of two feedbacks together; None if they contradict each other.

    An outcome that is null contradicts nothing.
    """
    merged = {**new, **stored}
    if "reward" in stored and "reward" in new and stored["reward"] != new["reward"]:
        return None
    if "outcomes" in stored and "outcomes" in new:
        if len(stored["outcomes"]) != len(new["outcomes"]):
            return None
        pairs = list(zip(stored["outcomes"], new["outcomes"], strict=True))
        if any(None not in pair and json.dumps(pair[0]) != json.dumps(pair[1]) for pair in pairs):
            return None
        merged["outcomes"] = [first if first is not None else second for first, second in pairs]
    return merged


def _values(feedback: Feedback, state: State) -> dict[str, Any]:
    """A row of FEEDBACK."""
    return {
        "model": feedback.model,
        "principal": feedback.principal,
        "request_id": feedback.request_id,
        "said": json.dumps(feedback.content),
        "reward": feedback.content.get("reward"),
        "said_by": feedback.sender,
        "at": feedback.at,
        "state": state,
    }


def _feedback(row: Row[Any]) -> Feedback:
    return Feedback(row.model, row.request_id, json.loads(row.said), row.principal, row.at, row.said_by)


def _restored(values: Mapping[str, Any]) -> Prediction:
    fields = {name: value for name, value in values.items() if name != "shadow"}
    return Prediction(**{**fields, **{name: orjson.loads(fields[name]) for name in ("rows", "answer")}})
