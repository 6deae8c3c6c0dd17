"""The log of predictions and of feedback on them, in SQL (SQLite, PostgreSQL)."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import sqlalchemy
from sqlalchemy import Row

from app.state import database, record_tables
from app.state.feedback import (
    HOUR_S,
    Feedback,
    FeedbackStatus,
    Sender,
    State,
    StoredFeedback,
    decide,
    sender_of,
)
from app.state.record_tables import FEEDBACK, PREDICTION_COLUMNS, PREDICTIONS

JSON_COLUMNS = ("rows", "answer")


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
    """Time of the request, seconds since the epoch."""
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


def encode(prediction: Prediction) -> bytes:
    """A prediction as JSON for the database. Raises TypeError or ValueError for values that JSON lacks."""
    values = {name: getattr(prediction, name) for name in PREDICTION_COLUMNS}
    # As a string within the JSON: PostgreSQL would parse nested JSON, and reject "\u0000" in it.
    for name in JSON_COLUMNS:
        values[name] = orjson.dumps(values[name], option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return orjson.dumps(list(values.values()))


def decode(encoded: bytes) -> Prediction:
    """The prediction that `encode` encoded."""
    return _prediction(dict(zip(PREDICTION_COLUMNS, orjson.loads(encoded), strict=True)))


class Records:
    """The tables of predictions and feedback, opened at the first use. Safe to use from several threads and
    processes."""

    def __init__(self) -> None:
        self._database = database.connect(record_tables.PART)

    def add(self, encoded: Sequence[bytes]) -> int:
        """Store all of these predictions or none; returns the number of new ones, when they are durable.

        The first prediction for a principal's request id is kept. An empty batch tests whether the database
        accepts writes. Raises SQLAlchemyError, or an error of the driver, if it does not.
        """
        batch = b"[" + b",".join(encoded) + b"]"
        with self._database.begin() as connection:
            statement = record_tables.insert_predictions(connection.dialect.name)
            return connection.execute(statement, {"batch": batch.decode()}).rowcount

    def add_feedback(self, batch: Sequence[Feedback], per_hour: int) -> list[FeedbackStatus]:
        """Store what is new, and return the status of each feedback, when all are durable.

        A sender may send feedback on `per_hour` requests to a model within an hour; the excess is
        quarantined. Of each row's outcomes and of the rewards, the first one that counts is kept.
        """
        with self._database.begin() as connection:
            # No other process writes feedback between the reads and the writes of this transaction.
            database.begin_exclusively(connection, "feedback")
            stored = _stored(connection, batch)
            num_sent = {sender: _num_sent(connection, sender) for sender in {*map(sender_of, batch)}}
            statuses, changes = [], {}
            for feedback in batch:
                key = _key(feedback)
                status, change = decide(feedback, stored.get(key), num_sent, per_hour)
                statuses.append(status)
                if change is not None:
                    stored[key] = changes[key] = change
            if changes:
                connection.execute(FEEDBACK.delete().where(_KEY.in_(list(changes))))
                connection.execute(FEEDBACK.insert(), [_values(change) for change in changes.values()])
        return statuses

    def predictions(
        self, model: str, request_ids: Iterable[str] | None = None, principal: str | None = None
    ) -> list[Prediction]:
        """A model's predictions, or those with these request ids and this principal, the oldest first."""
        query = PREDICTIONS.select().where(PREDICTIONS.c.model == model).order_by(PREDICTIONS.c.at)
        if request_ids is not None:
            query = query.where(PREDICTIONS.c.request_id.in_(list(request_ids)))
        if principal is not None:
            query = query.where(PREDICTIONS.c.principal == principal)
        with self._database.connect() as connection:
            return [_prediction(dict(row._mapping)) for row in connection.execute(query)]

    def feedback(self, model: str, *, quarantined: bool = False) -> list[Feedback]:
        """The feedback on a model that counts, or that does not, the oldest first.

        Feedback that came before its prediction was recorded may have more or fewer outcomes than the
        prediction has rows.
        """
        is_after = PREDICTIONS.select().where(_IS_ABOUT, PREDICTIONS.c.at <= FEEDBACK.c.at).exists()
        counts = (FEEDBACK.c.state == State.COUNTS) | ((FEEDBACK.c.state == State.EARLY) & is_after)
        query = FEEDBACK.select().where(FEEDBACK.c.model == model, ~counts if quarantined else counts)
        with self._database.connect() as connection:
            return [_feedback(row) for row in connection.execute(query.order_by(FEEDBACK.c.at))]

    def rewards(self, model: str, since: float) -> dict[str, tuple[int, float]]:
        """Number and sum of the rewards of each version since a time, in seconds since the epoch.

        Only feedback that counts is included, and only on answers whose variant was drawn at random.
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


class _FeedbackKey(NamedTuple):
    """Key of the prediction that feedback is about."""

    model: str
    principal: str
    request_id: str


_KEY = sqlalchemy.tuple_(FEEDBACK.c.model, FEEDBACK.c.principal, FEEDBACK.c.request_id)
_IS_ABOUT = sqlalchemy.and_(
    PREDICTIONS.c.model == FEEDBACK.c.model,
    PREDICTIONS.c.principal == FEEDBACK.c.principal,
    PREDICTIONS.c.request_id == FEEDBACK.c.request_id,
    PREDICTIONS.c.shadow == "",
)


def _key(feedback: Feedback) -> _FeedbackKey:
    return _FeedbackKey(feedback.model, feedback.principal, feedback.request_id)


def _stored(
    connection: sqlalchemy.Connection, batch: Sequence[Feedback]
) -> dict[_FeedbackKey, StoredFeedback]:
    """The stored feedback on the same predictions as the batch."""
    query = FEEDBACK.select().where(_KEY.in_([_key(feedback) for feedback in batch]))
    stored = [StoredFeedback(_feedback(row), State(row.state)) for row in connection.execute(query)]
    return {_key(one.feedback): one for one in stored}


def _num_sent(connection: sqlalchemy.Connection, sender: Sender) -> int:
    """Number of requests to a model on which a sender has sent feedback within the last hour."""
    query = sqlalchemy.select(sqlalchemy.func.count()).where(
        FEEDBACK.c.model == sender.model,
        FEEDBACK.c.said_by == sender.name,
        FEEDBACK.c.at > time.time() - HOUR_S,
        FEEDBACK.c.state != State.EXCESS,
    )
    return connection.execute(query).scalar_one()


def _values(stored: StoredFeedback) -> dict[str, Any]:
    """A row of FEEDBACK."""
    feedback, state = stored
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


def _prediction(values: Mapping[str, Any]) -> Prediction:
    fields = {name: value for name, value in values.items() if name != "shadow"}
    return Prediction(**{**fields, **{name: orjson.loads(fields[name]) for name in JSON_COLUMNS}})
