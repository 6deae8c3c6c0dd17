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
    """What came of a prediction."""

    model: str
    request_id: str
    said: Mapping[str, Any]
    """`outcomes`, one for each row and null where it is not known, `reward`, or both."""
    principal: str
    """Who got the prediction."""
    at: float
    said_by: str
    predicted_at: float | None = None
    """When the prediction was made, seconds since the epoch; None if none is known."""


class State(StrEnum):
    """What a stored feedback is worth."""

    COUNTS = "counts"
    EARLY = "early"
    """No prediction was known. It counts once there is one that was made before the feedback: predictions
    are recorded behind their answers. It never keeps later feedback from being stored."""
    EXCESS = "excess"
    """More than its sayer may say in an hour; never counts, and keeps no later feedback from being stored."""


class Verdict(Enum):
    """What became of a feedback."""

    STORED = "stored"
    AGAIN = "stored before"
    """The same was said before."""
    CONTRADICTED = "contradicted"
    """Something else was said before, and stays."""
    QUARANTINED = "quarantined"
    """Beyond the hour's share."""
    UNKNOWN = "unknown request"
    """Set apart until the prediction is recorded."""


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

    def judge(self, given: Sequence[Feedback], per_hour: int) -> list[Verdict]:
        """Store what is new, and return what became of each. Returns when it is durable.

        A sayer may give `per_hour` feedbacks on a model within an hour; what it says beyond is quarantined.
        Of each row's outcome and of the reward, the first that counts stands.
        """
        with self._database.begin() as connection:
            # Nobody else writes between what is read here and what is written.
            database.begin_exclusively(connection, "feedback")
            stored = _stored(connection, given)
            sayers = {(f.model, f.said_by) for f in given}
            used = {sayer: _used(connection, *sayer) for sayer in sayers}
            verdicts, changed = [], {}
            for feedback in given:
                verdict, change = _judged(feedback, stored.get(_key(feedback)), used, per_hour)
                verdicts.append(verdict)
                if change is not None:
                    stored[_key(feedback)] = changed[_key(feedback)] = change
            if changed:
                connection.execute(FEEDBACK.delete().where(_KEY.in_(list(changed))))
                connection.execute(FEEDBACK.insert(), [_values(*change) for change in changed.values()])
        return verdicts

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
    connection: sqlalchemy.Connection, given: Sequence[Feedback]
) -> dict[_Key, tuple[Feedback, State]]:
    """What is stored about the same predictions."""
    query = FEEDBACK.select().where(_KEY.in_([_key(feedback) for feedback in given]))
    found = [(_feedback(row), State(row.state)) for row in connection.execute(query)]
    return {_key(feedback): (feedback, state) for feedback, state in found}


def _used(connection: sqlalchemy.Connection, model: str, said_by: str) -> int:
    """How much of its share a sayer has used within the last hour."""
    query = sqlalchemy.select(sqlalchemy.func.count()).where(
        FEEDBACK.c.model == model,
        FEEDBACK.c.said_by == said_by,
        FEEDBACK.c.at > time.time() - HOUR_S,
        FEEDBACK.c.state != State.EXCESS,
    )
    return connection.execute(query).scalar_one()


def _judged(
    feedback: Feedback,
    stored: tuple[Feedback, State] | None,
    used: dict[tuple[str, str], int],
    per_hour: int,
) -> tuple[Verdict, tuple[Feedback, State] | None]:
    """What becomes of a feedback, and what is to be stored, if anything; counts it in `used`."""
    predicted_at, sayer = feedback.predicted_at, (feedback.model, feedback.said_by)
    if stored is not None:
        before, state = stored
        was_in_time = predicted_at is not None and before.at >= predicted_at
        if state is State.COUNTS or (state is State.EARLY and was_in_time):
            said = _merged(before.said, feedback.said)
            if said is None:
                return Verdict.CONTRADICTED, None
            if said == before.said:
                return Verdict.AGAIN, None
            return Verdict.STORED, (replace(before, said=said), State.COUNTS)
        is_counted = before.said_by == feedback.said_by and before.at > feedback.at - HOUR_S
        if state is State.EARLY and is_counted:
            used[sayer] -= 1  # it is replaced
    if used[sayer] >= per_hour:
        return Verdict.QUARANTINED, (feedback, State.EXCESS)
    used[sayer] += 1
    if predicted_at is None:
        return Verdict.UNKNOWN, (feedback, State.EARLY)
    return Verdict.STORED, (feedback, State.COUNTS)


def _merged(before: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Both together; None if they contradict each other. An outcome that is null says nothing of its row."""
    merged = {**said, **before}
    if "reward" in before and "reward" in said and before["reward"] != said["reward"]:
        return None
    if "outcomes" in before and "outcomes" in said:
        if len(before["outcomes"]) != len(said["outcomes"]):
            return None
        pairs = list(zip(before["outcomes"], said["outcomes"], strict=True))
        if any(None not in pair and json.dumps(pair[0]) != json.dumps(pair[1]) for pair in pairs):
            return None
        merged["outcomes"] = [old if old is not None else new for old, new in pairs]
    return merged


def _values(feedback: Feedback, state: State) -> dict[str, Any]:
    """A row of FEEDBACK."""
    return {
        "model": feedback.model,
        "principal": feedback.principal,
        "request_id": feedback.request_id,
        "said": json.dumps(feedback.said),
        "reward": feedback.said.get("reward"),
        "said_by": feedback.said_by,
        "at": feedback.at,
        "state": state,
    }


def _feedback(row: Row[Any]) -> Feedback:
    return Feedback(row.model, row.request_id, json.loads(row.said), row.principal, row.at, row.said_by)


def _restored(values: Mapping[str, Any]) -> Prediction:
    fields = {name: value for name, value in values.items() if name != "shadow"}
    return Prediction(**{**fields, **{name: orjson.loads(fields[name]) for name in ("rows", "answer")}})
