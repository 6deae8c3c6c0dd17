"""The log of predictions and of what came of them, in SQL (SQLite, PostgreSQL)."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import orjson
import sqlalchemy
from sqlalchemy import Boolean, Column, Float, Index, LargeBinary, String, Table, Text

from app import database
from app.database import TABLES

HOUR_S = 3600.0

PREDICTIONS = Table(
    "predictions",
    TABLES,
    Column("model", String(128), primary_key=True),
    Column("request_id", String(64), primary_key=True),
    Column("variant", String(128), primary_key=True),
    Column("version", String(32), nullable=False),
    Column("role", String(8), nullable=False),
    Column("unit", String(256), nullable=False),
    Column("principal", String(256), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("rows", LargeBinary, nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Index("predictions_at", "model", "at"),
)
FEEDBACK = Table(
    "feedback",
    TABLES,
    Column("model", String(128), primary_key=True),
    Column("request_id", String(64), primary_key=True),
    Column("said", Text, nullable=False),
    Column("reward", Float(53)),
    Column("principal", String(256), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("quarantined", Boolean, nullable=False),
    Index("feedback_at", "model", "at"),
    Index("feedback_principal", "principal", "at"),
)


# A batch goes to the database as one JSON array: with a statement for each prediction the interpreter would
# change hands for each of them, and requests would wait for it, tens of milliseconds twice a second.
INSERT = """
    INSERT INTO predictions
        (model, request_id, variant, version, role, unit, principal, at, seconds, rows, answer)
    SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, {values}
    FROM {batch} WHERE true ON CONFLICT DO NOTHING
"""
DIALECTS = {
    "sqlite": {
        "values": "value ->> 7, value ->> 8, CAST(value ->> 9 AS BLOB), CAST(value ->> 10 AS BLOB)",
        "batch": "json_each(:batch)",
    },
    "postgresql": {
        "values": "CAST(value ->> 7 AS float8), CAST(value ->> 8 AS float8), "
        "convert_to(value ->> 9, 'UTF8'), convert_to(value ->> 10, 'UTF8')",
        "batch": "json_array_elements(CAST(:batch AS json)) AS batch (value)",
    },
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A request and what a variant said to it."""

    model: str
    request_id: str
    variant: str
    version: str
    role: str
    """`served`; `forced`, if the client chose the variant; or `shadow`, if nobody was told."""
    unit: str
    principal: str
    at: float
    """When it was asked, seconds since the epoch."""
    seconds: float
    """How long the answer took."""
    rows: Sequence[Mapping[str, Any]]
    """As they were asked about."""
    answer: Sequence[Mapping[str, Any]]
    """What was said of each; numbers may be numpy's."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What came of a prediction."""

    model: str
    request_id: str
    said: Mapping[str, Any]
    """`outcomes`, one for each row, `reward`, or both."""
    principal: str
    at: float


class Verdict(Enum):
    """What became of a feedback."""

    STORED = "stored"
    AGAIN = "stored before"
    """The same was said before."""
    CONTRADICTED = "contradicted"
    """Something else was said before, and stays."""
    QUARANTINED = "quarantined"
    """Stored apart: this principal says more than it may in an hour."""


class Records:
    """The two tables. Safe to use from several threads and processes."""

    def __init__(self) -> None:
        self._engine = database.connect()

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Store them all or none; those that are there already stay. Returns when they are durable."""
        batch = b"[" + b",".join(map(_stored, predictions)) + b"]"
        with self._engine.begin() as connection:
            statement = sqlalchemy.text(INSERT.format(**DIALECTS[connection.dialect.name]))
            connection.execute(statement, {"batch": batch.decode()})

    def judge(self, given: Sequence[Feedback], per_hour: int) -> list[Verdict]:
        """Store what is new, and say of each what became of it. Returns when it is durable.

        A principal may say `per_hour` things within an hour; what it says beyond is quarantined.
        """
        with self._engine.begin() as connection:
            # Nobody else writes between what is read here and what is written.
            database.begin_exclusively(connection, "feedback")
            counts = self._counts(connection, {f.principal for f in given})
            before = self._said(connection, given)
            verdicts, new = [], []
            for feedback in given:
                key, said = (feedback.model, feedback.request_id), _canonical(feedback.said)
                if key in before:
                    verdicts.append(Verdict.AGAIN if before[key] == said else Verdict.CONTRADICTED)
                    continue
                before[key] = said
                counts[feedback.principal] += 1
                quarantined = counts[feedback.principal] > per_hour
                verdicts.append(Verdict.QUARANTINED if quarantined else Verdict.STORED)
                new.append(
                    {
                        **asdict(feedback),
                        "said": said,
                        "reward": feedback.said.get("reward"),
                        "quarantined": quarantined,
                    }
                )
            if new:
                connection.execute(FEEDBACK.insert(), new)
        return verdicts

    def predictions(self, model: str, request_ids: Iterable[str] | None = None) -> list[Prediction]:
        """Those of a model, or some of them, the oldest first."""
        query = PREDICTIONS.select().where(PREDICTIONS.c.model == model).order_by(PREDICTIONS.c.at)
        if request_ids is not None:
            query = query.where(PREDICTIONS.c.request_id.in_(list(request_ids)))
        with self._engine.connect() as connection:
            return [_restored(dict(row._mapping)) for row in connection.execute(query)]

    def feedback(self, model: str, *, quarantined: bool = False) -> list[Feedback]:
        """What was said about a model's predictions, the oldest first."""
        query = FEEDBACK.select().where(FEEDBACK.c.model == model, FEEDBACK.c.quarantined == quarantined)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(FEEDBACK.c.at))
            return [
                Feedback(row.model, row.request_id, json.loads(row.said), row.principal, row.at)
                for row in rows
            ]

    def rewards(self, model: str, since: float) -> dict[str, tuple[int, float]]:
        """What feedback brought each version since a time: how many rewards, and their sum. Of answers that
        clients got by chance alone, and without what is quarantined."""
        about = sqlalchemy.and_(
            FEEDBACK.c.model == PREDICTIONS.c.model, FEEDBACK.c.request_id == PREDICTIONS.c.request_id
        )
        query = (
            sqlalchemy.select(
                PREDICTIONS.c.version, sqlalchemy.func.count(), sqlalchemy.func.sum(FEEDBACK.c.reward)
            )
            .select_from(FEEDBACK.join(PREDICTIONS, about))
            .where(
                FEEDBACK.c.model == model,
                FEEDBACK.c.at >= since,
                FEEDBACK.c.reward.is_not(None),
                FEEDBACK.c.quarantined.is_(False),
                PREDICTIONS.c.role == "served",
                PREDICTIONS.c.at >= since,
            )
            .group_by(PREDICTIONS.c.version)
        )
        with self._engine.connect() as connection:
            return {version: (count, total) for version, count, total in connection.execute(query)}

    def close(self) -> None:
        self._engine.dispose()

    def _counts(self, connection: sqlalchemy.Connection, principals: set[str]) -> Counter[str]:
        query = (
            sqlalchemy.select(FEEDBACK.c.principal, sqlalchemy.func.count())
            .where(FEEDBACK.c.principal.in_(principals), FEEDBACK.c.at > time.time() - HOUR_S)
            .group_by(FEEDBACK.c.principal)
        )
        return Counter(dict(tuple(row) for row in connection.execute(query)))

    def _said(
        self, connection: sqlalchemy.Connection, given: Sequence[Feedback]
    ) -> dict[tuple[str, str], str]:
        key = sqlalchemy.tuple_(FEEDBACK.c.model, FEEDBACK.c.request_id)
        query = sqlalchemy.select(FEEDBACK.c.model, FEEDBACK.c.request_id, FEEDBACK.c.said).where(
            key.in_([(f.model, f.request_id) for f in given])
        )
        return {(row.model, row.request_id): row.said for row in connection.execute(query)}


def _stored(prediction: Prediction) -> bytes:
    values = [getattr(prediction, name) for name in Prediction.__slots__]
    # As text within the JSON: PostgreSQL does not look into it, where it would not take "\u0000".
    values[-2:] = [orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode() for value in values[-2:]]
    return orjson.dumps(values)


def _restored(values: Mapping[str, Any]) -> Prediction:
    return Prediction(**{**values, **{name: orjson.loads(values[name]) for name in ("rows", "answer")}})


def _canonical(said: Mapping[str, Any]) -> str:
    return json.dumps(said, sort_keys=True, ensure_ascii=False)
