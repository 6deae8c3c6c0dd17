"""The tables of predictions and feedback, how a batch is written, and the steps from their older forms."""

import sqlalchemy
from sqlalchemy import Column, Connection, Float, Index, LargeBinary, MetaData, String, Table, Text

from app.state.database import Part

TABLES = MetaData()

PREDICTIONS = Table(
    "predictions",
    TABLES,
    # Clients choose request ids, so an id is unique only among one principal's requests.
    Column("model", String(128), primary_key=True),
    Column("principal", String(256), primary_key=True),
    Column("request_id", String(64), primary_key=True),
    Column("shadow", String(128), primary_key=True),  # empty for the answer that the client got
    Column("variant", String(128), nullable=False),
    Column("version", String(32), nullable=False),
    Column("role", String(8), nullable=False),
    Column("unit", String(256), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("rows", LargeBinary, nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Index("predictions_by_time", "model", "at"),
)
FEEDBACK = Table(
    "feedback",
    TABLES,
    Column("model", String(128), primary_key=True),
    Column("principal", String(256), primary_key=True),  # who got the prediction
    Column("request_id", String(64), primary_key=True),
    Column("said", Text, nullable=False),
    Column("reward", Float(53)),
    Column("said_by", String(256), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("state", String(8), nullable=False),  # see `app.state.records.State`
    Index("feedback_by_time", "model", "at"),
    Index("feedback_by_sayer", "model", "said_by", "at"),
)
COLUMNS = (
    *("model", "principal", "request_id", "shadow", "variant", "version", "role", "unit"),
    *("at", "seconds", "rows", "answer"),
)

# A batch goes to the database as one JSON array: a statement for each prediction would hold the GIL for each
# of them, and requests would wait tens of milliseconds twice a second.
INSERT = """
    INSERT INTO predictions ({columns}) SELECT {texts}, {values} FROM {batch}
    WHERE true ON CONFLICT DO NOTHING
"""
DIALECTS = {
    "sqlite": {
        "values": "value ->> 8, value ->> 9, CAST(value ->> 10 AS BLOB), CAST(value ->> 11 AS BLOB)",
        "batch": "json_each(:batch)",
    },
    "postgresql": {
        "values": "CAST(value ->> 8 AS float8), CAST(value ->> 9 AS float8), "
        "convert_to(value ->> 10, 'UTF8'), convert_to(value ->> 11, 'UTF8')",
        "batch": "json_array_elements(CAST(:batch AS json)) AS batch (value)",
    },
}


def insert(dialect: str) -> sqlalchemy.TextClause:
    """The statement that writes a JSON array of predictions, each an array in the order of COLUMNS."""
    texts = ", ".join(f"value ->> {place}" for place in range(8))
    return sqlalchemy.text(INSERT.format(columns=", ".join(COLUMNS), texts=texts, **DIALECTS[dialect]))


def _key_by_principal(connection: Connection) -> None:
    """Version 1 to 2. Predictions had the key (model, request id, variant), feedback (model, request id).

    Of several answers to one request the oldest stays. Feedback goes to the prediction that it was about,
    whoever said it, as version 1 allowed.
    """
    for name in ("predictions_at", "feedback_at", "feedback_principal"):
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {name}")
    for name in ("predictions", "feedback"):
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {name}_1")
    PREDICTIONS.create(connection)
    FEEDBACK.create(connection)
    connection.exec_driver_sql(
        f"INSERT INTO predictions ({', '.join(COLUMNS)}) SELECT model, principal, request_id, "
        "CASE role WHEN 'shadow' THEN variant ELSE '' END, variant, version, role, unit, at, seconds, rows, "
        "answer FROM predictions_1 WHERE true ORDER BY at ON CONFLICT DO NOTHING"
    )
    is_about = "p.model = f.model AND p.request_id = f.request_id AND p.shadow = ''"
    principal = (
        f"coalesce((SELECT f.principal FROM predictions p WHERE {is_about} AND p.principal = f.principal), "
        f"(SELECT p.principal FROM predictions p WHERE {is_about} ORDER BY p.at LIMIT 1), f.principal)"
    )
    connection.exec_driver_sql(
        "INSERT INTO feedback (model, principal, request_id, said, reward, said_by, at, state) "
        f"SELECT f.model, {principal}, f.request_id, f.said, f.reward, f.principal, f.at, "
        "CASE WHEN f.quarantined THEN 'excess' ELSE 'counts' END FROM feedback_1 f"
    )
    for name in ("predictions_1", "feedback_1"):
        connection.exec_driver_sql(f"DROP TABLE {name}")


PART = Part("records", TABLES, (_key_by_principal,))
