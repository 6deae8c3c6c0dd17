import pytest
from sqlalchemy.exc import OperationalError

from app.registry import connection, versions
from tests.versions import registered


def test_all_state_is_in_the_state_directory(home, bundles):
    registered("placed", bundles[0])
    assert (home / "mlflow.db").is_file()
    assert list((home / "artifacts" / "placed").rglob("model.onnx"))


def test_a_database_that_does_not_answer_is_an_error_at_once(monkeypatch):
    def never(**_):
        raise AssertionError("MLflow would try again for minutes")

    monkeypatch.setattr(connection, "MlflowClient", never)
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(OperationalError, match="Connection refused"):
        versions.versions("income")
