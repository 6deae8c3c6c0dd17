"""The tables of predictions and feedback, the statement that inserts a batch, and migrations."""

import sqlalchemy
from sqlalchemy import Column, Connection, Float, Index, LargeBinary, MetaData, String, Table, Text

from app.state import sql
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
    Column("said", Text, nullable=False),  # `Feedback.content`, as JSON
    Column("reward", Float(53)),
    Column("said_by", String(256), nullable=False),  # `Feedback.sender`
    Column("at", Float(53), nullable=False),
    Column("state", String(8), nullable=False),  # `app.state.feedback.State`
    Index("feedback_by_time", "model", "at"),
    Index("feedback_by_sayer", "model", "said_by", "at"),
)
PREDICTION_COLUMNS = tuple(PREDICTIONS.columns.keys())


def insert_predictions(dialect: str) -> sqlalchemy.TextClause:
    """The statement that inserts a batch of predictions, a JSON array of arrays in the order of
    PREDICTION_COLUMNS.

    The batch is one parameter: with a statement per prediction, the driver would hold the GIL for each, and
    requests would wait tens of milliseconds twice a second.
    """
    return sqlalchemy.text(sql.statement(f"insert_predictions_{dialect}"))


def _key_by_principal(connection: Connection) -> None:
    """Migrate version 1 to 2, which has the principal in the keys of both tables."""
    for name in ("predictions_at", "feedback_at", "feedback_principal"):
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {name}")
    for table in (PREDICTIONS, FEEDBACK):
        connection.exec_driver_sql(f"ALTER TABLE {table.name} RENAME TO {table.name}_1")
        table.create(connection)
    for table in (PREDICTIONS, FEEDBACK):
        connection.exec_driver_sql(sql.statement(f"copy_{table.name}_1"))
        connection.exec_driver_sql(f"DROP TABLE {table.name}_1")


PART = Part("records", TABLES, (_key_by_principal,))
