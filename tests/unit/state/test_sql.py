import pytest
import sqlalchemy

from app.state import record_tables, sql
from app.state.record_tables import PREDICTION_COLUMNS


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_predictions_are_inserted_in_the_order_of_the_columns(dialect):
    statement = sql.statement(f"insert_predictions_{dialect}")
    assert f"({', '.join(PREDICTION_COLUMNS)})" in statement
    clause = record_tables.insert_predictions(dialect)
    assert isinstance(clause, sqlalchemy.TextClause)
    assert list(clause.compile().params) == ["batch"], "comments must contain no parameter"


def test_an_unknown_statement_is_an_error():
    with pytest.raises(FileNotFoundError):
        sql.statement("nothing")
